//! Loads a model through mistral.rs.

use std::{path::Path, sync::Arc, time::Instant};

use mistralrs_core::{
    AutoDeviceMapParams, DeviceMapSetting, GGUFLoaderBuilder, GGUFSpecificConfig, Loader, MemoryGpuConfig, ModelDType,
    NormalLoaderBuilder, NormalSpecificConfig, PagedAttentionConfig, PagedCacheType, Pipeline, TokenSource,
};
use tokio::sync::Mutex;

use super::{
    convert::{self, Prepared},
    without_frames,
};
use crate::config::Weights;
use crate::engine::token::{ChatTemplate, ModelInfo, Vocabulary};

/// A loaded model and what is known of it.
pub(super) struct Loaded {
    pub pipeline: Arc<Mutex<dyn Pipeline + Send + Sync>>,
    pub info: ModelInfo,
    /// Bytes of keys and values that a token takes in the prefix cache.
    pub bytes_per_token: u64,
    /// Whether the engine batches sequences and manages its cache by itself.
    pub paged: bool,
    /// The token that ends every sequence; see [`super::sampler::Endings`].
    pub sentinel: u32,
}

/// Loads a model: a GGUF file, a folder with safetensors, or a Hugging Face id. Takes seconds to minutes and a
/// whole core; call it where that does not matter.
///
/// # Errors
/// A text for the operator: which file, what is wrong with it, and what to do.
pub(super) fn load(source: &str, weights: Weights) -> Result<Loaded, String> {
    let started = Instant::now();
    let device = mistralrs::best_device(false).map_err(without_frames)?;
    let path = Path::new(source);
    let prepared = if path.is_dir() {
        Some(Prepared::Folder(path.to_owned()))
    } else if path.is_file() {
        Some(convert::prepare(path, weights, device.is_cpu())?)
    } else if source.ends_with(".gguf") || source.starts_with(['/', '.']) {
        return Err(format!("{source}: no such file. Name a GGUF file, a folder or a Hugging Face id."));
    } else {
        None
    };
    let (loader, from): (Box<dyn Loader>, String) = match &prepared {
        Some(Prepared::Gguf(file)) => {
            let folder = file.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let name = file.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            let folder = folder.to_string_lossy().into_owned();
            let config = GGUFSpecificConfig { topology: None };
            (
                GGUFLoaderBuilder::new(None, None, folder, vec![name], config, false, None).build(),
                file.display().to_string(),
            )
        }
        Some(Prepared::Folder(folder)) => (folder_loader(&folder.to_string_lossy())?, folder.display().to_string()),
        None => (folder_loader(source)?, format!("Hugging Face, {source}")),
    };
    tracing::info!(model = source, from, "loading");
    let paged = (!device.is_cpu() && mistralrs_core::paged_attn_supported())
        .then(|| {
            PagedAttentionConfig::new(
                None,
                MemoryGpuConfig::ContextSize(AutoDeviceMapParams::DEFAULT_MAX_SEQ_LEN),
                PagedCacheType::Auto,
            )
        })
        .transpose()
        .map_err(without_frames)?;
    let dtype = if device.is_cpu() { ModelDType::F32 } else { ModelDType::Auto };
    // The loader panics on some broken files instead of returning an error.
    let pipeline = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        loader.load_model_from_hf(
            None,
            TokenSource::CacheToken,
            &dtype,
            &device,
            true,
            DeviceMapSetting::Auto(AutoDeviceMapParams::default_text()),
            None,
            paged,
        )
    }))
    .map_err(|_| format!("{source}: the files could not be read; they may be incomplete, get them again"))?
    .map_err(|e| format!("{source}: {}", without_frames(e)))?;
    let architecture = prepared.as_ref().and_then(convert::architecture).unwrap_or_else(|| "unknown".into());
    let loaded = describe(source, architecture, pipeline, paged.is_some())?;
    tracing::info!(
        model = source,
        architecture = loaded.info.architecture,
        context = loaded.info.context,
        seconds = started.elapsed().as_secs_f32(),
        "loaded"
    );
    Ok(loaded)
}

fn folder_loader(model: &str) -> Result<Box<dyn Loader>, String> {
    let config = NormalSpecificConfig {
        topology: None,
        organization: Default::default(),
        write_uqff: None,
        from_uqff: None,
        imatrix: None,
        calibration_file: None,
        hf_cache_path: None,
        matformer_config_path: None,
        matformer_slice_name: None,
    };
    NormalLoaderBuilder::new(config, None, None, Some(model.to_owned()), false, None)
        .build(None)
        .map_err(|e| format!("{model}: {}", without_frames(e)))
}

/// Texts with which models end a turn, beside the one that their file names.
const END_OF_TURN: [&str; 7] =
    ["<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>", "</s>"];

fn describe(
    source: &str,
    architecture: String,
    pipeline: Arc<Mutex<dyn Pipeline + Send + Sync>>,
    paged: bool,
) -> Result<Loaded, String> {
    let held = pipeline.try_lock().map_err(|_| "the model is in use while it loads".to_owned())?;
    let metadata = held.get_metadata();
    let tokenizer = held.tokenizer().ok_or_else(|| format!("{source}: no tokenizer comes with it"))?;
    let template = held.get_chat_template().ok_or_else(|| format!("{source}: no chat template comes with it"))?;
    let chat_template = ChatTemplate {
        source: match template.chat_template.as_ref().map(|t| &t.0) {
            Some(one_or_named) => one_or_named.as_ref().either(String::clone, |named| pick_template(named)),
            None => {
                return Err(format!("{source}: the model has no chat template; use an instruction-tuned model"));
            }
        },
        bos_token: template.bos_tok().unwrap_or_default(),
        eos_token: template.eos_tok().unwrap_or_default(),
    };
    let mut end_of_turn = metadata.eos_tok.clone();
    for name in END_OF_TURN {
        if let Some(id) = tokenizer.token_to_id(name).filter(|id| !end_of_turn.contains(id)) {
            end_of_turn.push(id);
        }
    }
    let shape = metadata.model_metadata.as_ref();
    let layers = metadata.num_hidden_layers;
    let bytes_per_token = shape.map_or(0, |shape| {
        let per_layer =
            |i| shape.num_kv_heads_for_layer(i) * (shape.k_head_dim_for_layer(i) + shape.v_head_dim_for_layer(i));
        ((0..layers).map(per_layer).sum::<usize>() * metadata.activation_dtype.size_in_bytes()) as u64
    });
    // The engine's buffers grow in blocks of 512 tokens and may not grow past the model's length.
    let longest = metadata.max_seq_len;
    let context = if longest > 512 { longest / 512 * 512 } else { longest };
    let vocabulary = Vocabulary::new((*tokenizer).clone(), None, end_of_turn)?;
    let sentinel = sentinel(&vocabulary, &chat_template)
        .ok_or_else(|| format!("{source}: its tokenizer has no special token that is free to mark ends with"))?;
    drop(held);
    Ok(Loaded {
        pipeline,
        info: ModelInfo { source: source.to_owned(), architecture, context, chat_template, vocabulary },
        bytes_per_token,
        paged,
        sentinel,
    })
}

/// Of several named templates the one for tools, else the default.
fn pick_template(named: &[std::collections::HashMap<String, String>]) -> String {
    let by_name = |name: &str| {
        named.iter().find(|t| t.get("name").is_some_and(|n| n == name)).and_then(|t| t.get("template")).cloned()
    };
    by_name("tool_use").or_else(|| by_name("default")).unwrap_or_default()
}

/// A special token that occurs in no prompt: not in the template, no end of turn, no part of a call.
fn sentinel(vocabulary: &Vocabulary, template: &ChatTemplate) -> Option<u32> {
    let mut free: Vec<u32> = vocabulary
        .special_names()
        .iter()
        .filter(|name| !template.source.contains(name.as_str()))
        .filter(|name| **name != template.bos_token && **name != template.eos_token && !name.contains("tool"))
        .filter_map(|name| vocabulary.special(name))
        .filter(|id| !vocabulary.end_of_turn().contains(id))
        .collect();
    free.sort_unstable();
    free.pop()
}
