//! What stands in for models of its own in a build without an engine.

use std::sync::Arc;

use crate::{config, turn::Model};

/// Without an engine there is nothing to load.
///
/// # Errors
/// Always.
pub(super) async fn load(_model: &config::Model) -> Result<Arc<dyn Model>, String> {
    Err("this program was built without an engine; build it with the feature `mistral`".into())
}
