//! Applies what a model learned to the weights that it was trained from.
//!
//! A delta is a safetensors file. Of each matrix W of shape (rows, columns) it holds `W.signs`, a bit for each weight,
//! row after row from the lowest bit of a byte to the highest, and `W.scales`, an F32 for each row: a weight becomes
//! larger by its row's scale where its bit is set, and smaller where not. Of each vector V it holds `V.change`, F32, which
//! is added. One bit keeps nearly all that fine-tuning changes ([BitDelta](https://arxiv.org/abs/2402.10193)). Each weight
//! is one sum of two F32, the same to the bit on every machine.

use std::{collections::HashMap, fs, path::Path};

use candle_core::{DType, Device, Tensor};

use super::convert::{Prepared, at, prepare, progress};
use crate::config::Weights;

/// The file that holds a folder's weights.
const WEIGHTS: &str = "model.safetensors";

/// Writes the folder `out` with the F32 weights of a GGUF file, changed by a delta.
///
/// # Errors
/// A text for the operator: what cannot be read or written, or does not fit.
pub fn merge(gguf: &Path, delta: &[u8], out: &Path) -> Result<(), String> {
    let Prepared::Folder(base) = prepare(gguf, Weights::F32, true)? else {
        return Err(at(gguf, "a delta is merged into F32 weights only"));
    };
    let weights = base.join(WEIGHTS);
    let mut tensors = candle_core::safetensors::load(&weights, &Device::Cpu).map_err(|e| at(&weights, e))?;
    let delta = candle_core::safetensors::load_buffer(delta, &Device::Cpu)
        .map_err(|e| format!("the delta is no safetensors file: {e}"))?;
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
        return Err("the delta changes nothing: it holds no NAME.signs and no NAME.change of this model".into());
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
    match (part("signs"), part("scales"), part("change")) {
        (None, None, None) => Ok(None),
        (None, None, Some(change)) => (weight + change).map(Some),
        (Some(signs), Some(scales), None) => stepped(weight, signs, scales).map(Some),
        _ => candle_core::bail!("signs go with scales, and with nothing else"),
    }
}

/// Moves each weight by its row's scale, up where its sign is set.
fn stepped(weight: &Tensor, signs: &Tensor, scales: &Tensor) -> candle_core::Result<Tensor> {
    let (rows, columns) = weight.dims2()?;
    if signs.dims() != [rows, columns.div_ceil(8)] || scales.dims() != [rows] || signs.dtype() != DType::U8 {
        candle_core::bail!("the shapes do not fit");
    }
    let mut weights = weight.flatten_all()?.to_vec1::<f32>()?;
    let (signs, scales) = (signs.flatten_all()?.to_vec1::<u8>()?, scales.to_vec1::<f32>()?);
    let rows = weights.chunks_exact_mut(columns).zip(signs.chunks_exact(columns.div_ceil(8)));
    for ((row, signs), scale) in rows.zip(scales) {
        for (at, weight) in row.iter_mut().enumerate() {
            *weight += if (signs[at / 8] >> (at % 8)) & 1 == 1 { scale } else { -scale };
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
        let weight = tensor((0..20).map(|n| n as f32).collect(), &[2, 10]);
        let signs = Tensor::from_vec(vec![0b0000_0101u8, 0b10, 0, 0b01], (2, 2), &Device::Cpu).unwrap();
        let delta = HashMap::from([
            ("w.signs".to_owned(), signs.clone()),
            ("w.scales".to_owned(), tensor(vec![0.5, 1.0], &[2])),
            ("v.change".to_owned(), tensor(vec![1.0, -2.0], &[2])),
            ("odd.signs".to_owned(), signs),
        ]);
        let moved = |name: &str, weight: &Tensor| {
            changed_by(&delta, name, weight)
                .map(|new| new.map(|new| new.flatten_all().unwrap().to_vec1::<f32>().unwrap()))
        };
        let first = [0.5, 0.5, 2.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 9.5];
        let second = [9., 10., 11., 12., 13., 14., 15., 16., 19., 18.];
        assert_eq!(moved("w", &weight).unwrap().unwrap(), [first, second].concat());
        assert_eq!(moved("v", &tensor(vec![1., 1.], &[2])).unwrap().unwrap(), [2., -1.]);
        assert!(moved("other", &weight).unwrap().is_none());
        assert!(moved("odd", &weight).is_err(), "signs without scales");
        assert!(moved("w", &tensor(vec![0.; 24], &[2, 12])).is_ok(), "as many bytes");
        assert!(moved("w", &tensor(vec![0.; 20], &[1, 20])).is_err());
    }
}
