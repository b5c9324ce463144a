//! The protocols that clients speak, one file each: wire types, parsing, rendering, handler.

pub mod chat_completions;
mod fields;
