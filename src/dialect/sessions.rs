//! Live sessions over HTTP, of all dialects: what an operator or a bot beside the call wants to know.

use std::{collections::HashMap, sync::Arc};

use serde_json::{Value, json};

use super::{items, realtime, responses::shorten};
use crate::{
    error::Error,
    session::{About, Handle, Owner, Sessions, State},
    turn::Usage,
};

/// Most sessions of one page.
const MOST_LISTED: usize = 1_000;

/// The sessions of an owner, a page of them: oldest first, `limit` of them after the one named `after`.
///
/// # Errors
/// [`Error::Invalid`] for a `limit` that cannot be.
pub fn list(sessions: &Sessions, owner: &Owner, query: &HashMap<String, String>) -> Result<Value, Error> {
    let limit = match query.get("limit").map(|limit| limit.parse::<usize>()) {
        None => 100,
        Some(Ok(limit @ 1..=MOST_LISTED)) => limit,
        Some(_) => return Err(Error::invalid("limit", "limit has to be a whole number from 1 to 1000")),
    };
    let mut found = sessions.list(owner);
    if let Some(after) = query.get("after") {
        // Ids sort by time, also those of sessions that have ended since.
        found.retain(|about| *about.id > **after);
    }
    let has_more = found.len() > limit;
    found.truncate(limit);
    Ok(json!({
        "object": "list",
        "data": found.iter().map(|about| about_value(about, None)).collect::<Vec<_>>(),
        "first_id": found.first().map(|about| &about.id),
        "last_id": found.last().map(|about| &about.id),
        "has_more": has_more,
    }))
}

/// A session with its settings and its history.
///
/// # Errors
/// [`Error::NotFound`].
pub async fn show(sessions: &Sessions, owner: &Owner, id: &str) -> Result<Value, Error> {
    let session = find(sessions, owner, id)?;
    let snapshot = session.describe().await?;
    let mut value = about_value(session.about(), Some(snapshot.state));
    let settings = &snapshot.settings;
    value["instructions"] = (*settings.instructions).into();
    value["tools"] = items::tools_value(settings).into();
    value["items"] = snapshot.items.iter().map(|item| realtime::item_value(item)).collect();
    value["unanswered"] = snapshot.unanswered.iter().map(|call| &**call).collect();
    Ok(value)
}

/// Ends a session.
///
/// # Errors
/// [`Error::NotFound`].
pub async fn end(sessions: &Sessions, owner: &Owner, id: &str) -> Result<Value, Error> {
    find(sessions, owner, id)?.close().await;
    Ok(json!({"id": id, "object": "session.deleted", "deleted": true}))
}

fn find(sessions: &Sessions, owner: &Owner, id: &str) -> Result<Handle, Error> {
    sessions.find(shorten(id), owner)
}

fn about_value(about: &Arc<About>, state: Option<State>) -> Value {
    let state = match state {
        Some(State::WaitingForTools) => "waiting_for_tools",
        Some(State::Generating) => "generating",
        None if about.is_running() => "generating",
        Some(State::Idle) | None => "idle",
    };
    let Usage { prompt_tokens, cached_tokens, completion_tokens } = about.usage();
    json!({
        "id": about.id,
        "object": "session",
        "dialect": about.dialect,
        "model": about.model,
        "created_at": about.created_at,
        "connected": about.is_connected(),
        "state": state,
        "responses": about.responses(),
        "usage": {"input_tokens": prompt_tokens, "cached_tokens": cached_tokens, "output_tokens": completion_tokens},
    })
}
