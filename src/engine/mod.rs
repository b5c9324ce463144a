//! The seam between the Electron layer and whatever runs a model.
//!
//! An engine in this process continues a prompt of tokens ([`token`]). The Electron layer turns the tokens that come back
//! into [`crate::turn::TurnEvent`]s. An engine on other servers ([`upstream`]) takes turns as they are.

#[cfg(feature = "mistral")]
pub mod mistral;
#[cfg(feature = "mistral")]
pub mod token;
pub mod upstream;

use std::time::Duration;

/// How long a refused caller should wait, when nothing better is known.
pub const RETRY_AFTER: Duration = Duration::from_secs(2);
