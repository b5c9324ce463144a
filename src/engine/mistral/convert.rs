//! Turns a GGUF file into the form that answers soonest on this machine, once, beside the file.
//!
//! On a CPU, quantized weights cost a dot product a row and a token, so that a token of the prompt is about as dear as
//! a generated one; F32 weights go through a real matrix product, and a prompt is read several times faster while each
//! generated token takes up to twice as long. A voice agent waits for the first token and speaks 3.5 tokens a second,
//! so a small model is stored as F32. A large one would not fit: there only the tensors are requantized whose type has
//! no SIMD kernel (Q4_1, Q5_0, Q5_1), to Q8_0.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{BufReader, BufWriter},
    path::{Path, PathBuf},
};

use candle_core::{
    Device, Tensor,
    quantized::{GgmlDType, QTensor, gguf_file},
};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use super::without_frames;
use crate::config::Weights;

/// Where the weights are to be loaded from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Prepared {
    /// A GGUF file.
    Gguf(PathBuf),
    /// A folder with `config.json`, `tokenizer.json` and safetensors.
    Folder(PathBuf),
}

/// Why a file could not be prepared.
pub(super) type Fault = String;

/// The architecture of prepared weights, as their file names it.
pub(super) fn architecture(prepared: &Prepared) -> Option<String> {
    match prepared {
        Prepared::Gguf(file) => Some(Gguf::open(file).ok()?.text("general.architecture").ok()?.to_owned()),
        Prepared::Folder(folder) => {
            let config = fs::read(folder.join("config.json")).ok()?;
            let config: Value = serde_json::from_slice(&config).ok()?;
            Some(config["architectures"][0].as_str()?.to_owned())
        }
    }
}

/// Parameters up to which `auto` chooses F32 on a CPU: 3 GB of weights.
const SMALL: usize = 750_000_000;

/// Changes whenever a conversion would come out differently, so that old results are made again.
const VERSION: u32 = 1;

/// Converts a GGUF file as asked, or finds the result of an earlier run.
pub(super) fn prepare(gguf: &Path, weights: Weights, on_cpu: bool) -> Result<Prepared, Fault> {
    let mut file = Gguf::open(gguf)?;
    let weights = match weights {
        Weights::Auto if !on_cpu => Weights::AsIs,
        Weights::Auto if file.parameters() <= SMALL && file.convertible().is_ok() => Weights::F32,
        Weights::Auto => Weights::Q8_0,
        chosen => chosen,
    };
    match weights {
        Weights::F32 => {
            let kind = file.convertible()?;
            made_once(gguf, "f32", |out| {
                fs::create_dir_all(out).map_err(|e| at(out, e))?;
                file.write_f32(kind, out)
            })
            .map(Prepared::Folder)
        }
        Weights::Q8_0 if file.content.tensor_infos.values().any(|t| slow(t.ggml_dtype)) => {
            made_once(gguf, "q8_0.gguf", |out| file.write_q8_0(out)).map(Prepared::Gguf)
        }
        _ => Ok(Prepared::Gguf(gguf.to_owned())),
    }
}

/// Whether candle has no SIMD kernel for a type.
fn slow(dtype: GgmlDType) -> bool {
    matches!(dtype, GgmlDType::Q4_1 | GgmlDType::Q5_0 | GgmlDType::Q5_1)
}

/// Makes `FILE.SUFFIX` unless it is there and was made from this very file. It appears whole or not at all.
fn made_once(gguf: &Path, suffix: &str, make: impl FnOnce(&Path) -> Result<(), Fault>) -> Result<PathBuf, Fault> {
    let out = gguf.with_extension(suffix);
    let stamp_file = gguf.with_extension(format!("{suffix}.made"));
    let meta = fs::metadata(gguf).map_err(|e| at(gguf, e))?;
    let changed = meta.modified().ok().and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok());
    let stamp = format!("{VERSION} {} {}", meta.len(), changed.map_or(0, |t| t.as_secs()));
    if out.exists() && fs::read_to_string(&stamp_file).is_ok_and(|s| s == stamp) {
        return Ok(out);
    }
    // Another process may be at the same; each writes to a place of its own.
    let part = gguf.with_extension(format!("{suffix}.part-{}", std::process::id()));
    remove(&part)?;
    let made = make(&part).and_then(|()| {
        let stamped = fs::read_to_string(&stamp_file).is_ok_and(|s| s == stamp);
        if stamped && out.exists() {
            return remove(&part);
        }
        remove(&out)?;
        fs::rename(&part, &out).map_err(|e| at(&out, e))
    });
    if let Err(fault) = made {
        let _ = remove(&part);
        return Err(fault);
    }
    fs::write(&stamp_file, stamp).map_err(|e| at(&stamp_file, e))?;
    Ok(out)
}

fn remove(path: &Path) -> Result<(), Fault> {
    let done = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match done {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(at(path, e)),
        _ => Ok(()),
    }
}

pub(super) fn at(path: &Path, e: impl std::fmt::Display) -> Fault {
    format!("{}: {}", path.display(), without_frames(e))
}

/// How a family of models is laid out in safetensors.
#[derive(Clone, Copy, Debug)]
struct Kind {
    /// The architecture's name in `config.json`.
    class: &'static str,
    model_type: &'static str,
    /// Whether GGUF keeps the rows of the query and key matrices in the interleaved order of its rotary embedding.
    interleaved: bool,
    pre_tokenizer: PreTokenizer,
}

#[derive(Clone, Copy, Debug)]
enum PreTokenizer {
    /// GPT-2's own pattern.
    Gpt2,
    /// Digits one by one, then GPT-2's pattern.
    SingleDigits,
    /// A pattern of the model's own, then bytes.
    Pattern(&'static str),
}

const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// A GGUF file and its header.
struct Gguf {
    path: PathBuf,
    content: gguf_file::Content,
    reader: BufReader<File>,
}

// === impl Gguf ===

impl Gguf {
    fn open(path: &Path) -> Result<Self, Fault> {
        let file = File::open(path).map_err(|e| at(path, e))?;
        let mut reader = BufReader::with_capacity(1 << 20, file);
        let content = gguf_file::Content::read(&mut reader)
            .map_err(|e| at(path, format!("not a readable GGUF file ({e}); download it again")))?;
        Ok(Self { path: path.to_owned(), content, reader })
    }

    fn parameters(&self) -> usize {
        self.content.tensor_infos.values().map(|t| t.shape.elem_count()).sum()
    }

    fn get(&self, key: &str) -> Result<&gguf_file::Value, Fault> {
        self.content.metadata.get(key).ok_or_else(|| at(&self.path, format!("the header lacks `{key}`")))
    }

    fn text(&self, key: &str) -> Result<&str, Fault> {
        self.get(key)?.to_string().map(String::as_str).map_err(|e| at(&self.path, format!("{key}: {e}")))
    }

    fn number(&self, key: &str) -> Result<u64, Fault> {
        let value = self.get(key)?;
        let number = value.to_u64().or_else(|_| value.to_u32().map(u64::from));
        number.or_else(|_| value.to_i32().map(|n| n.max(0) as u64)).map_err(|e| at(&self.path, format!("{key}: {e}")))
    }

    fn list(&self, key: &str) -> Result<&[gguf_file::Value], Fault> {
        self.get(key)?.to_vec().map(Vec::as_slice).map_err(|e| at(&self.path, format!("{key}: {e}")))
    }

    /// Whether this file can become a safetensors folder, and how.
    fn convertible(&self) -> Result<Kind, Fault> {
        let architecture = self.text("general.architecture")?;
        let tokenizer = self.text("tokenizer.ggml.model")?;
        let pre = self.text("tokenizer.ggml.pre").unwrap_or("default");
        let refuse =
            |what: String| at(&self.path, format!("{what} cannot be converted to F32; use weights = \"q8_0\""));
        if tokenizer != "gpt2" {
            return Err(refuse(format!("a tokenizer of kind `{tokenizer}`")));
        }
        let pre_tokenizer = match pre {
            "gpt-2" => PreTokenizer::Gpt2,
            "smollm" => PreTokenizer::SingleDigits,
            "qwen2" => PreTokenizer::Pattern(QWEN2),
            "llama-bpe" | "llama3" | "llama-v3" => PreTokenizer::Pattern(LLAMA3),
            other => return Err(refuse(format!("a tokenizer with `{other}` splitting"))),
        };
        let (class, model_type, interleaved) = match architecture {
            "llama" => ("LlamaForCausalLM", "llama", true),
            "qwen2" => ("Qwen2ForCausalLM", "qwen2", false),
            "qwen3" => ("Qwen3ForCausalLM", "qwen3", false),
            other => return Err(refuse(format!("architecture `{other}`"))),
        };
        if self.content.tensor_infos.contains_key("rope_freqs.weight") {
            return Err(refuse("scaled rotary embedding".into()));
        }
        Ok(Kind { class, model_type, interleaved, pre_tokenizer })
    }

    fn write_f32(&mut self, kind: Kind, out: &Path) -> Result<(), Fault> {
        let config = self.config(kind)?;
        let write = |name: &str, value: &Value| {
            let path = out.join(name);
            fs::write(&path, value.to_string()).map_err(|e| at(&path, e))
        };
        write("config.json", &config)?;
        write("tokenizer.json", &self.tokenizer(kind)?)?;
        write("tokenizer_config.json", &self.tokenizer_config()?)?;
        write("generation_config.json", &json!({"eos_token_id": self.number("tokenizer.ggml.eos_token_id")?}))?;

        let heads = config["num_attention_heads"].as_u64().unwrap_or(1) as usize;
        let kv_heads = config["num_key_value_heads"].as_u64().unwrap_or(1) as usize;
        let mut names: Vec<String> = self.content.tensor_infos.keys().cloned().collect();
        names.sort();
        let bar = progress("Converting to F32", names.len() as u64 + 1);
        let mut tensors = HashMap::with_capacity(names.len());
        for name in names {
            let tensor = self.tensor(&name)?.dequantize(&Device::Cpu).map_err(|e| at(&self.path, e))?;
            let renamed = renamed(&name).ok_or_else(|| at(&self.path, format!("unknown tensor `{name}`")))?;
            let tensor = match (kind.interleaved, name.contains("attn_q."), name.contains("attn_k.")) {
                (true, true, _) => split_halves(&tensor, heads),
                (true, _, true) => split_halves(&tensor, kv_heads),
                _ => Ok(tensor),
            }
            .map_err(|e| at(&self.path, format!("{name}: {e}")))?;
            tensors.insert(renamed, tensor);
            bar.inc(1);
        }
        let path = out.join("model.safetensors");
        candle_core::safetensors::save(&tensors, &path).map_err(|e| at(&path, e))?;
        bar.finish_and_clear();
        Ok(())
    }

    fn write_q8_0(&mut self, out: &Path) -> Result<(), Fault> {
        let mut names: Vec<String> = self.content.tensor_infos.keys().cloned().collect();
        names.sort();
        let bar = progress("Requantizing to Q8_0", names.len() as u64 + 1);
        let mut tensors = Vec::with_capacity(names.len());
        for name in names {
            let mut tensor = self.tensor(&name)?;
            if slow(tensor.dtype()) {
                tensor = tensor
                    .dequantize(&Device::Cpu)
                    .and_then(|t| QTensor::quantize(&t, GgmlDType::Q8_0))
                    .map_err(|e| at(&self.path, format!("{name}: {e}")))?;
            }
            tensors.push((name, tensor));
            bar.inc(1);
        }
        let mut metadata: Vec<(&str, &gguf_file::Value)> =
            self.content.metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
        metadata.sort_by_key(|(key, _)| *key);
        let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        let file = File::create(out).map_err(|e| at(out, e))?;
        gguf_file::write(&mut BufWriter::new(file), &metadata, &tensors).map_err(|e| at(out, e))?;
        bar.finish_and_clear();
        Ok(())
    }

    fn tensor(&mut self, name: &str) -> Result<QTensor, Fault> {
        self.content
            .tensor(&mut self.reader, name, &Device::Cpu)
            .map_err(|e| at(&self.path, format!("{name}: {e}; the file may be cut off, download it again")))
    }

    fn config(&self, kind: Kind) -> Result<Value, Fault> {
        let architecture = self.text("general.architecture")?.to_owned();
        let number = |key: &str| self.number(&format!("{architecture}.{key}"));
        let float = |key: &str| {
            let key = format!("{architecture}.{key}");
            self.get(&key)?.to_f32().map_err(|e| at(&self.path, format!("{key}: {e}")))
        };
        let (hidden, heads) = (number("embedding_length")?, number("attention.head_count")?);
        Ok(json!({
            "architectures": [kind.class],
            "model_type": kind.model_type,
            "hidden_size": hidden,
            "intermediate_size": number("feed_forward_length")?,
            "num_hidden_layers": number("block_count")?,
            "num_attention_heads": heads,
            "num_key_value_heads": number("attention.head_count_kv").unwrap_or(heads),
            "head_dim": number("attention.key_length").unwrap_or(hidden / heads.max(1)),
            "rms_norm_eps": float("attention.layer_norm_rms_epsilon")?,
            "rope_theta": float("rope.freq_base").unwrap_or(10_000.0),
            "max_position_embeddings": number("context_length")?,
            "vocab_size": self.list("tokenizer.ggml.tokens")?.len(),
            "hidden_act": "silu",
            "attention_bias": false,
            "tie_word_embeddings": !self.content.tensor_infos.contains_key("output.weight"),
            "sliding_window": null,
            "use_sliding_window": false,
            "max_window_layers": 0,
            "torch_dtype": "float32",
        }))
    }

    fn token(&self, key: &str) -> Option<&str> {
        let id = self.number(key).ok()? as usize;
        self.list("tokenizer.ggml.tokens").ok()?.get(id)?.to_string().ok().map(String::as_str)
    }

    fn tokenizer_config(&self) -> Result<Value, Fault> {
        Ok(json!({
            "bos_token": self.token("tokenizer.ggml.bos_token_id"),
            "eos_token": self.token("tokenizer.ggml.eos_token_id"),
            "chat_template": self.text("tokenizer.chat_template")?,
        }))
    }

    /// A `tokenizer.json` of the byte-level BPE in the header.
    fn tokenizer(&self, kind: Kind) -> Result<Value, Fault> {
        /// Token types of GGUF.
        const CONTROL: i32 = 3;
        const USER_DEFINED: i32 = 4;
        let mut vocab = serde_json::Map::new();
        let mut added = Vec::new();
        let types = self.list("tokenizer.ggml.token_type")?;
        for (id, token) in self.list("tokenizer.ggml.tokens")?.iter().enumerate() {
            let token = token.to_string().map_err(|e| at(&self.path, e))?;
            let kind = types.get(id).and_then(|t| t.to_i32().ok()).unwrap_or(1);
            if kind == CONTROL || kind == USER_DEFINED {
                added.push(json!({
                    "id": id, "content": token, "special": kind == CONTROL, "single_word": false,
                    "lstrip": false, "rstrip": false, "normalized": false,
                }));
            }
            vocab.insert(token.clone(), json!(id));
        }
        let merges: Vec<&String> =
            self.list("tokenizer.ggml.merges")?.iter().filter_map(|merge| merge.to_string().ok()).collect();
        let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
        let pre_tokenizer = match kind.pre_tokenizer {
            PreTokenizer::Gpt2 => bytes(true),
            PreTokenizer::SingleDigits => json!({"type": "Sequence", "pretokenizers": [
                {"type": "Digits", "individual_digits": true}, bytes(true)]}),
            PreTokenizer::Pattern(pattern) => json!({"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
                bytes(false)]}),
        };
        Ok(json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
            "pre_tokenizer": pre_tokenizer, "post_processor": null, "decoder": bytes(true),
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                "ignore_merges": matches!(kind.pre_tokenizer, PreTokenizer::Pattern(LLAMA3)),
                "vocab": vocab, "merges": merges,
            },
        }))
    }
}

/// The safetensors name of a GGUF tensor.
fn renamed(name: &str) -> Option<String> {
    match name {
        "token_embd.weight" => return Some("model.embed_tokens.weight".into()),
        "output_norm.weight" => return Some("model.norm.weight".into()),
        "output.weight" => return Some("lm_head.weight".into()),
        _ => {}
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let (part, ending) = rest.rsplit_once('.')?;
    let part = match part {
        "attn_norm" => "input_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_output" => "self_attn.o_proj",
        "attn_q_norm" => "self_attn.q_norm",
        "attn_k_norm" => "self_attn.k_norm",
        "ffn_norm" => "post_attention_layernorm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        _ => return None,
    };
    Some(format!("model.layers.{layer}.{part}.{ending}"))
}

/// Undoes the row order of GGUF's rotary embedding: from interleaved pairs to two halves a head.
fn split_halves(tensor: &Tensor, heads: usize) -> candle_core::Result<Tensor> {
    let shape = tensor.shape().clone();
    let rows = shape.dims()[0];
    let columns = shape.elem_count() / rows;
    tensor.reshape((heads, rows / heads / 2, 2, columns))?.transpose(1, 2)?.contiguous()?.reshape(shape)
}

/// A progress bar on standard error; nothing where that is no terminal.
pub(super) fn progress(what: &'static str, steps: u64) -> ProgressBar {
    let bar = ProgressBar::new(steps);
    if let Ok(style) = ProgressStyle::with_template("{msg} [{bar:30}] {percent}% {eta}") {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_message(what);
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_a_head_are_put_back_into_two_halves() {
        let interleaved = Tensor::new(&[0f32, 4., 1., 5., 2., 6., 3., 7.], &Device::Cpu).unwrap();
        let rows = split_halves(&interleaved.reshape((8, 1)).unwrap(), 1).unwrap();
        assert_eq!(rows.flatten_all().unwrap().to_vec1::<f32>().unwrap(), [0., 1., 2., 3., 4., 5., 6., 7.]);
    }

    #[test]
    fn tensor_names_follow_the_transformers_layout() {
        assert_eq!(renamed("blk.12.attn_q.weight").as_deref(), Some("model.layers.12.self_attn.q_proj.weight"));
        assert_eq!(renamed("blk.0.attn_k.bias").as_deref(), Some("model.layers.0.self_attn.k_proj.bias"));
        assert_eq!(renamed("blk.0.ssm_a"), None);
    }

    #[test]
    fn a_file_that_is_no_gguf_is_refused_with_its_name() {
        let dir = std::env::temp_dir().join(format!("convert-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let path = dir.join("broken.gguf");
        fs::write(&path, b"GGUFnonsense").unwrap();
        let fault = prepare(&path, Weights::Auto, true).unwrap_err();
        assert!(fault.contains("broken.gguf") && fault.contains("download it again"), "{fault}");
        fs::remove_dir_all(dir).unwrap();
    }
}
