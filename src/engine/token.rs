//! Engines that continue a prompt of tokens, in this process.
//!
//! A [`TokenEngine`] knows nothing of tools, fillers or wire formats. What is special about a turn reaches it as a
//! [`Guide`], which narrows each step to the tokens that may come next.

use std::{sync::Arc, time::Instant};

use llguidance::toktrie::{SimpleVob, TokEnv, TokTrie};
use tokenizers::Tokenizer;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::{
    error::Error,
    turn::{Gauges, Readiness, Sampling},
};

/// A model that continues a prompt of tokens.
pub trait TokenEngine: Send + Sync + 'static {
    /// What the layer above has to know of the model. Constant for the life of the engine.
    fn model(&self) -> &Arc<ModelInfo>;

    /// Queues a generation and returns at once.
    ///
    /// # Errors
    /// [`Error::Overloaded`] when the queue is full or the engine is not ready.
    fn generate(&self, generation: Generation) -> Result<Tokens, Error>;

    /// Queues the prefill of a prompt that a later generation will extend, behind every waiting generation. It yields
    /// [`TokenEvent::Started`] and, once the whole prompt is in the prefix cache, [`TokenEvent::Finished`].
    ///
    /// # Errors
    /// As [`TokenEngine::generate`].
    fn warm(&self, prompt: Vec<u32>) -> Result<Tokens, Error>;

    /// Whether generations are likely to succeed now.
    fn readiness(&self) -> Readiness;

    /// Counters for the metrics page.
    fn gauges(&self) -> Gauges;
}

/// What is known of a loaded model.
pub struct ModelInfo {
    /// The id or path that it was loaded from.
    pub source: String,
    /// The architecture, as the model file names it.
    pub architecture: String,
    /// Tokens that a prompt and its answer may have together.
    pub context: usize,
    /// The chat template in Jinja, and its special tokens.
    pub chat_template: ChatTemplate,
    /// Text to tokens and back.
    pub vocabulary: Vocabulary,
}

/// A model's chat template.
#[derive(Clone, Debug, Default)]
pub struct ChatTemplate {
    /// Jinja source.
    pub source: String,
    /// What `bos_token` stands for in it; empty where the model has none.
    pub bos_token: String,
    /// What `eos_token` stands for in it.
    pub eos_token: String,
}

/// A model's tokens: text to ids, ids to bytes.
pub struct Vocabulary {
    tokenizer: Tokenizer,
    env: TokEnv,
    end_of_turn: Vec<u32>,
}

/// What a generation needs.
pub struct Generation {
    /// The whole prompt. Not empty, shorter than the context.
    pub prompt: Vec<u32>,
    /// How tokens are drawn. [`Sampling::stop`] is the guide's concern.
    pub sampling: Sampling,
    /// Most tokens to generate; prompt and this fit the context.
    pub max_tokens: usize,
    /// What may come next.
    pub guide: Box<dyn Guide>,
    /// Whether it takes up a turn that has had its place already: it goes before all that wait.
    pub goes_on: bool,
}

/// Steers a generation. It is called on the engine's thread between two steps of the model, so it must be quick.
pub trait Guide: Send {
    /// The tokens that may come next; `None` is all of them.
    ///
    /// # Errors
    /// A text for the log; the generation fails.
    fn allowed(&mut self) -> Result<Option<SimpleVob>, String>;

    /// Whether this token, though allowed, may not come next. Another one is drawn then.
    fn vetoes(&self, token: u32) -> bool;

    /// Whether the next token's [`Odds`] are told.
    fn weighs(&self) -> bool {
        false
    }

    /// Takes note of the token that came.
    ///
    /// # Errors
    /// A text for the log; the generation fails.
    fn commit(&mut self, token: u32) -> Result<Flow, String>;
}

/// Whether a generation goes on after a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// More may come.
    Continue,
    /// That was the last one.
    Stop,
}

/// What a generation yields.
#[derive(Debug)]
pub enum TokenEvent {
    /// The generation left the queue; the prefill starts.
    Started {
        /// When that was.
        at: Instant,
        /// Prompt tokens that the prefix cache serves.
        cached_tokens: usize,
    },
    /// A token, sent in the step that drew it.
    Token(Token),
    /// Nothing follows.
    Finished(TokenFinish),
}

/// A generated token.
#[derive(Clone, Debug)]
pub struct Token {
    /// Its id in the vocabulary.
    pub id: u32,
    /// When it was drawn.
    pub at: Instant,
    /// Its log-probability and the best alternatives, when asked for.
    pub logprob: Option<Logprob>,
    /// When the guide asked for them.
    pub odds: Option<Odds>,
}

/// How likely a token was and what else could have come, in natural logarithms of the distribution that it was drawn from,
/// before the guide narrowed it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Odds {
    /// Of the token that was drawn.
    pub chosen: f32,
    /// The likeliest other token that the guide allowed.
    pub runner_up: Option<(u32, f32)>,
}

/// How likely a token was, in natural logarithms of the model's own distribution.
#[derive(Clone, Debug)]
pub struct Logprob {
    /// Of the token that was drawn.
    pub chosen: f32,
    /// The most likely ones, best first.
    pub top: Vec<(u32, f32)>,
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenFinish {
    /// The model ended its turn.
    EndOfTurn,
    /// The guide ended it.
    Guide,
    /// `max_tokens` were generated.
    Length,
    /// It was cancelled.
    Cancelled,
}

/// The tokens of one generation. Dropping it stops the generation at the next token.
pub struct Tokens {
    events: mpsc::Receiver<Result<TokenEvent, Error>>,
    cancel: CancellationToken,
}

// === impl Tokens ===

impl Tokens {
    /// Pairs a receiver with the token that stops its generation.
    pub fn new(events: mpsc::Receiver<Result<TokenEvent, Error>>, cancel: CancellationToken) -> Self {
        Self { events, cancel }
    }

    /// The next event. `None` only after [`TokenEvent::Finished`] or an error.
    pub async fn next(&mut self) -> Option<Result<TokenEvent, Error>> {
        self.events.recv().await
    }

    /// Stops the generation at the next token; the events until then still come.
    pub fn cancel(&self) {
        self.cancel.cancel();
    }
}

impl Drop for Tokens {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

// === impl Vocabulary ===

impl Vocabulary {
    /// Makes the tables of a tokenizer.
    ///
    /// `size` is the length of the model's logits, which can exceed the tokenizer's own count. `end_of_turn` are the
    /// tokens with which the model ends its turn.
    ///
    /// # Errors
    /// When the tokenizer is of a kind whose tokens cannot be read as bytes.
    pub fn new(tokenizer: Tokenizer, size: Option<usize>, end_of_turn: Vec<u32>) -> Result<Self, String> {
        let mut bytes =
            toktrie_hf_tokenizers::ByteTokenizer::from_tokenizer(tokenizer.clone()).map_err(|e| e.to_string())?;
        bytes.set_eos_tokens(&end_of_turn);
        let env = bytes.into_tok_env(size).map_err(|e| e.to_string())?;
        Ok(Self { tokenizer, env, end_of_turn })
    }

    /// The tokenizer that it was made of.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The tokens of a text; the names of special tokens in it become those tokens.
    ///
    /// # Errors
    /// When the tokenizer refuses the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        let encoding = self.tokenizer.encode_fast(text, false).map_err(|e| Error::Internal(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The bytes of a token; for a special token those of its name.
    pub fn bytes(&self, token: u32) -> &[u8] {
        let bytes = self.trie().token(token);
        // A special token's entry is its name behind a marker byte that cannot occur in UTF-8.
        bytes.strip_prefix(&[TokTrie::SPECIAL_TOKEN_MARKER]).unwrap_or(bytes)
    }

    /// Whether a token is a control token, whose name is no part of any text.
    pub fn is_special(&self, token: u32) -> bool {
        self.trie().is_special_token(token)
    }

    /// The special token of this name.
    pub fn special(&self, name: &str) -> Option<u32> {
        self.trie().get_special_token(name)
    }

    /// The names of all special tokens.
    pub fn special_names(&self) -> Vec<String> {
        let added = self.tokenizer.get_added_tokens_decoder();
        added.into_values().filter(|token| token.special).map(|token| token.content).collect()
    }

    /// The one token that stands for exactly these bytes.
    pub fn token_of(&self, bytes: &[u8]) -> Option<u32> {
        self.trie().token_id(bytes)
    }

    /// Tokens with which the model ends its turn.
    pub fn end_of_turn(&self) -> &[u32] {
        &self.end_of_turn
    }

    /// For grammars.
    pub fn env(&self) -> &TokEnv {
        &self.env
    }

    /// How many tokens there are.
    pub fn size(&self) -> usize {
        self.trie().vocab_size()
    }

    fn trie(&self) -> &TokTrie {
        self.env.tok_trie()
    }
}
