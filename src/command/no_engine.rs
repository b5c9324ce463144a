//! What stands in for models of its own in a build without an engine.

use crate::{config, electron::Electron};

/// Without an engine there is nothing to load.
///
/// # Errors
/// Always.
pub(super) async fn load(_model: &config::Model) -> Result<Electron, String> {
    Err("this program was built without an engine; build it with the feature `mistral`".into())
}
