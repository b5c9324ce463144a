//! Applies what a model learned to the weights that it was trained from.
//!
//! A delta is one or several safetensors files. Of each matrix W of shape (rows, columns) they hold `W.directions`, five
//! weights in each byte, row after row, as digits of base 3 from the lowest place to the highest, and `W.scales`, an F32 for
//! each row: a weight becomes smaller by its row's scale where its digit is 0, stays where it is 1, and becomes larger where
//! it is 2. Of each vector V they hold `V.change`, F32, which is added. So little keeps nearly all that fine-tuning changes
//! (one bit does in [BitDelta](https://arxiv.org/abs/2402.10193)). Each weight is one sum of two F32, the same to the bit on
//! every machine.

use std::{collections::HashMap, fs, path::Path};

use candle_core::{DType, Device, Tensor};

use super::{
    convert::{Prepared, at, prepare, progress},
    without_frames,
};
use crate::config::Weights;

/// The file that holds a folder's weights.
pub const WEIGHTS: &str = "model.safetensors";

/// Weights in a byte.
const IN_A_BYTE: usize = 5;

/// Writes the folder `out` with the F32 weights of a GGUF file, changed by the parts of a delta.
///
/// # Errors
/// A text for the operator: what cannot be read or written, or does not fit.
pub fn merge(gguf: &Path, parts: &[&[u8]], out: &Path) -> Result<(), String> {
    let Prepared::Folder(base) = prepare(gguf, Weights::F32, true)? else {
        return Err(at(gguf, "a delta is merged into F32 weights only"));
    };
    let weights = base.join(WEIGHTS);
    let mut tensors = candle_core::safetensors::load(&weights, &Device::Cpu).map_err(|e| at(&weights, e))?;
    let mut delta = HashMap::new();
    for part in parts {
        let part = candle_core::safetensors::load_buffer(part, &Device::Cpu);
        delta.extend(part.map_err(|e| format!("the delta is no safetensors file: {}", without_frames(e)))?);
    }
    let bar = progress("Merging the delta", delta.len() as u64);
    let mut changed = 0;
    for (name, weight) in &mut tensors {
        if let Some(new) = changed_by(&delta, name, weight).map_err(|e| at(gguf, format!("{name}: {e}")))? {
            *weight = new;
            changed += 1;
            bar.inc(1);
        }
    }
    if changed == 0 {
        return Err("the delta changes nothing: it holds no NAME.directions and no NAME.change of this model".into());
    }
    fs::create_dir_all(out).map_err(|e| at(out, e))?;
    for name in ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"] {
        let to = out.join(name);
        fs::copy(base.join(name), &to).map_err(|e| at(&to, e))?;
    }
    let path = out.join(WEIGHTS);
    candle_core::safetensors::save(&tensors, &path).map_err(|e| at(&path, e))?;
    bar.finish_and_clear();
    Ok(())
}

/// What becomes of a tensor, if the delta has it.
fn changed_by(delta: &HashMap<String, Tensor>, name: &str, weight: &Tensor) -> candle_core::Result<Option<Tensor>> {
    let part = |kind: &str| delta.get(&format!("{name}.{kind}"));
    match (part("directions"), part("scales"), part("change")) {
        (None, None, None) => Ok(None),
        (None, None, Some(change)) => (weight + change).map(Some),
        (Some(directions), Some(scales), None) => stepped(weight, directions, scales).map(Some),
        _ => candle_core::bail!("directions go with scales, and with nothing else"),
    }
}

/// Moves each weight by its row's scale, where it is told to.
fn stepped(weight: &Tensor, directions: &Tensor, scales: &Tensor) -> candle_core::Result<Tensor> {
    let (rows, columns) = weight.dims2()?;
    let bytes = columns.div_ceil(IN_A_BYTE);
    if directions.dims() != [rows, bytes] || scales.dims() != [rows] || directions.dtype() != DType::U8 {
        candle_core::bail!("the shapes do not fit");
    }
    let mut weights = weight.flatten_all()?.to_vec1::<f32>()?;
    let (directions, scales) = (directions.flatten_all()?.to_vec1::<u8>()?, scales.to_vec1::<f32>()?);
    let rows = weights.chunks_exact_mut(columns).zip(directions.chunks_exact(bytes));
    for ((row, directions), scale) in rows.zip(scales) {
        for (weights, byte) in row.chunks_mut(IN_A_BYTE).zip(directions) {
            let mut digits = *byte;
            for weight in weights {
                match digits % 3 {
                    0 => *weight -= scale,
                    1 => {}
                    _ => *weight += scale,
                }
                digits /= 3;
            }
        }
    }
    Tensor::from_vec(weights, weight.shape(), &Device::Cpu)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_delta_moves_what_it_names() {
        let tensor = |values: Vec<f32>, shape: &[usize]| Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
        let weight = tensor((0..12).map(|n| n as f32).collect(), &[2, 6]);
        // 2 1 0 1 2, 0; 1 1 1 1 1, 2.
        let bytes = vec![2 + 3 + 27 + 2 * 81, 0, 1 + 3 + 9 + 27 + 81, 2u8];
        let directions = Tensor::from_vec(bytes, (2, 2), &Device::Cpu).unwrap();
        let delta = HashMap::from([
            ("w.directions".to_owned(), directions.clone()),
            ("w.scales".to_owned(), tensor(vec![0.5, 1.0], &[2])),
            ("v.change".to_owned(), tensor(vec![1.0, -2.0], &[2])),
            ("odd.directions".to_owned(), directions),
        ]);
        let moved = |name: &str, weight: &Tensor| {
            changed_by(&delta, name, weight)
                .map(|new| new.map(|new| new.flatten_all().unwrap().to_vec1::<f32>().unwrap()))
        };
        let all = [0.5, 1., 1.5, 3., 4.5, 4.5, 6., 7., 8., 9., 10., 12.];
        assert_eq!(moved("w", &weight).unwrap().unwrap(), all);
        assert_eq!(moved("v", &tensor(vec![1., 1.], &[2])).unwrap().unwrap(), [2., -1.]);
        assert!(moved("other", &weight).unwrap().is_none());
        assert!(moved("odd", &weight).is_err(), "directions without scales");
        assert!(moved("w", &tensor(vec![0.; 20], &[2, 10])).is_ok(), "as many bytes");
        assert!(moved("w", &tensor(vec![0.; 12], &[1, 12])).is_err());
    }
}
