//! What load balancers and monitoring ask.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
};
use serde_json::json;

use super::App;
use crate::turn::Readiness;

/// The process runs.
pub(super) async fn live() -> impl IntoResponse {
    Json(json!({"status": "live"}))
}

/// Turns are likely to succeed: 200, or 503 and why not.
pub(super) async fn ready(State(app): State<Arc<App>>) -> impl IntoResponse {
    match app.readiness() {
        Readiness::Ready => (StatusCode::OK, Json(json!({"status": "ready"}))),
        Readiness::NotReady(why) => {
            (StatusCode::SERVICE_UNAVAILABLE, Json(json!({"status": "not ready", "reason": why})))
        }
    }
}

/// Prometheus' text format.
pub(super) async fn metrics(State(app): State<Arc<App>>) -> impl IntoResponse {
    for (model, remote) in &app.remotes {
        for (server, good, open) in remote.upstreams().figures() {
            let labels = [("model", model.clone()), ("server", server.to_owned())];
            metrics::gauge!("electron_upstream_up", &labels).set(if good { 1.0 } else { 0.0 });
            metrics::gauge!("electron_upstream_running", &labels).set(open as f64);
        }
    }
    if let Some(gauges) = app.own.get().and_then(|model| model.gauges()) {
        metrics::gauge!("electron_queue_length").set(gauges.queued as f64);
        metrics::gauge!("electron_running").set(gauges.running as f64);
        metrics::gauge!("electron_prefix_cache_bytes").set(gauges.prefix_cache_bytes as f64);
        metrics::counter!("electron_prefix_cache_flushes_total").absolute(gauges.prefix_cache_flushes);
    }
    metrics::gauge!("electron_sessions").set(app.sessions.count() as f64);
    metrics::gauge!("electron_websockets").set(app.sockets.len() as f64);
    app.metrics.run_upkeep();
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], app.metrics.render())
}
