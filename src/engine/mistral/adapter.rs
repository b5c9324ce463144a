//! Merges a low-rank adapter into the model that it was trained on.
//!
//! An adapter holds, for each matrix W of a model, two narrow ones, and W + B·A takes W's place. The file is as the
//! [PEFT](https://huggingface.co/docs/peft) library writes it, with the scale already in B. The sums are made in one order
//! and without fused operations, so that the merged weights are the same to the bit on every machine.

use std::{fs, path::Path};

use candle_core::{DType, Device, Tensor};

use super::convert::{Prepared, at, prepare, progress};
use crate::config::Weights;

/// Writes the folder `out` with the F32 weights of a GGUF file and an adapter merged into them.
///
/// # Errors
/// A text for the operator: what cannot be read or written, or does not fit.
pub fn merge(gguf: &Path, adapter: &[u8], out: &Path) -> Result<(), String> {
    let Prepared::Folder(base) = prepare(gguf, Weights::F32, true)? else {
        return Err(at(gguf, "an adapter is merged into F32 weights only"));
    };
    let weights = base.join(WEIGHTS);
    let mut tensors = candle_core::safetensors::load(&weights, &Device::Cpu).map_err(|e| at(&weights, e))?;
    let adapter = candle_core::safetensors::load_buffer(adapter, &Device::Cpu)
        .map_err(|e| format!("the adapter is no safetensors file: {e}"))?;
    let mut changed = 0;
    let bar = progress("Merging the adapter", adapter.len() as u64 / 2);
    for (key, a) in &adapter {
        let Some(name) = key.strip_prefix("base_model.model.").and_then(|key| key.strip_suffix(".lora_A.weight"))
        else {
            continue;
        };
        let name = format!("{name}.weight");
        let b = adapter.get(&key.replace(".lora_A.", ".lora_B."));
        let (Some(b), Some(weight)) = (b, tensors.get(&name)) else {
            return Err(at(gguf, format!("the adapter is not for this model: {name}")));
        };
        let merged = merged(weight, a, b).map_err(|e| at(gguf, format!("{name}: {e}")))?;
        tensors.insert(name, merged);
        changed += 1;
        bar.inc(1);
    }
    if changed == 0 {
        return Err("the adapter holds no matrices named base_model.model.….lora_A.weight, as PEFT names them".into());
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

/// The file that holds a folder's weights.
const WEIGHTS: &str = "model.safetensors";

/// W + B·A, of the shapes (out, in), (rank, in) and (out, rank).
fn merged(weight: &Tensor, a: &Tensor, b: &Tensor) -> candle_core::Result<Tensor> {
    let (rank, columns) = a.dims2()?;
    let read = |tensor: &Tensor| tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
    let (mut sum, a, b) = (read(weight)?, read(a)?, read(b)?);
    if weight.dims2()? != (b.len() / rank.max(1), columns) {
        candle_core::bail!("the shapes do not fit");
    }
    let mut change = vec![0f32; columns];
    for (row, factors) in sum.chunks_exact_mut(columns).zip(b.chunks_exact(rank)) {
        change.fill(0.0);
        for (factor, a) in factors.iter().zip(a.chunks_exact(columns)) {
            change.iter_mut().zip(a).for_each(|(change, a)| *change += factor * a);
        }
        row.iter_mut().zip(&change).for_each(|(weight, change)| *weight += change);
    }
    Tensor::from_vec(sum, weight.shape(), &Device::Cpu)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_adapter_is_added_to_what_it_changes() {
        let tensor =
            |rows: &[&[f32]]| Tensor::from_vec(rows.concat(), (rows.len(), rows[0].len()), &Device::Cpu).unwrap();
        let weight = tensor(&[&[1., 2., 3.], &[4., 5., 6.]]);
        let (a, b) = (tensor(&[&[1., 0., 2.]]), tensor(&[&[10.], &[100.]]));
        assert_eq!(merged(&weight, &a, &b).unwrap().to_vec2::<f32>().unwrap(), [[11., 2., 23.], [104., 5., 206.]]);
        assert!(merged(&weight, &b, &a).is_err());
    }
}
