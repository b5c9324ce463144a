//! Logs, traces and metrics of the process.

use std::{io::IsTerminal, sync::OnceLock};

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig};
use opentelemetry_sdk::{Resource, propagation::TraceContextPropagator, trace::SdkTracerProvider};
use tracing_subscriber::{EnvFilter, Layer, fmt::format, layer::SubscriberExt, util::SubscriberInitExt};

use crate::config::{Log, LogFormat};

/// What sends spans away; kept until the process ends.
pub struct Telemetry(Option<SdkTracerProvider>);

/// Starts logging to standard error and, when `OTEL_EXPORTER_OTLP_ENDPOINT` is set, sending spans there over OTLP
/// (HTTP, protobuf). An incoming `traceparent` is continued.
///
/// # Errors
/// A text for the operator, when the exporter cannot be made.
pub fn start(log: &Log) -> Result<Telemetry, String> {
    opentelemetry::global::set_text_map_propagator(TraceContextPropagator::new());
    let endpoint = ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"]
        .iter()
        .any(|name| std::env::var(name).is_ok_and(|value| !value.is_empty()));
    let provider = if endpoint {
        // The endpoint and the headers are read from the environment by the exporter.
        let exporter = SpanExporter::builder()
            .with_http()
            .with_protocol(Protocol::HttpBinary)
            .build()
            .map_err(|e| format!("OTEL_EXPORTER_OTLP_ENDPOINT: {e}"))?;
        let resource = Resource::builder().with_service_name("electron-gateway").build();
        Some(SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build())
    } else {
        None
    };
    // What matters of MCP servers and of the engine is said by us; it also reports as an error what is done to empty its prefix cache.
    let quieter = "rmcp=off,mistralrs_core=off,mistralrs_quant=warn,mistralrs=warn,hyper=warn,reqwest=warn,opentelemetry=warn,opentelemetry_sdk=warn,opentelemetry-otlp=warn";
    let filter = EnvFilter::try_new(format!("{quieter},{}", log.level)).map_err(|e| format!("log.level: {e}"))?;
    let lines = match log.format {
        LogFormat::Human => tracing_subscriber::fmt::layer()
            .with_writer(std::io::stderr)
            .with_ansi(std::io::stderr().is_terminal())
            .with_target(false)
            .fmt_fields(format::debug_fn(|writer, field, value| {
                // Of a request's span people need its id; the rest is for traces.
                let name = field.name();
                match name {
                    "message" => write!(writer, "{value:?}"),
                    _ if ["otel.", "http.", "gen_ai."].iter().any(|of_traces| name.starts_with(of_traces)) => Ok(()),
                    _ => write!(writer, " {name}={value:?}"),
                }
            }))
            .boxed(),
        LogFormat::Json => tracing_subscriber::fmt::layer().json().with_writer(std::io::stderr).boxed(),
    };
    let spans = provider
        .as_ref()
        .map(|provider| tracing_opentelemetry::layer().with_tracer(provider.tracer("electron-gateway")));
    let _ = tracing_subscriber::registry().with(filter).with(lines).with(spans).try_init();
    Ok(Telemetry(provider))
}

impl Telemetry {
    /// Sends what is left. Blocks for a few seconds at most.
    pub fn stop(self) {
        if let Some(provider) = self.0 {
            let _ = provider.shutdown();
        }
    }
}

/// The recorder of the process, made once.
pub(super) fn metrics() -> PrometheusHandle {
    static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
    HANDLE
        .get_or_init(|| {
            let seconds = [
                0.0001, 0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0,
            ];
            let builder = PrometheusBuilder::new();
            let builder = builder.set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &seconds);
            let recorder = builder.expect("the list of buckets is not empty").build_recorder();
            let handle = recorder.handle();
            let _ = metrics::set_global_recorder(recorder);
            describe();
            handle
        })
        .clone()
}

fn describe() {
    use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};
    describe_counter!("electron_requests_total", "Requests by route and status.");
    describe_counter!("electron_turns_total", "Turns by how they ended.");
    describe_counter!("electron_prompt_tokens_total", "Tokens of prompts.");
    describe_counter!("electron_cached_tokens_total", "Tokens of prompts that the prefix cache served.");
    describe_counter!("electron_completion_tokens_total", "Generated tokens.");
    describe_counter!("electron_call_tries_total", "Other calls that were tried.");
    describe_counter!("electron_calls_replaced_total", "Turns in which other calls were likelier than the first ones.");
    describe_counter!("electron_discarded_tokens_total", "Tokens of calls that were generated and not sent.");
    describe_counter!("electron_prefix_cache_flushes_total", "Times that the prefix cache was emptied.");
    describe_counter!("electron_tool_attempts_total", "Requests to tools' callbacks by what came of them.");
    describe_counter!("electron_tool_results_refused_total", "Late results of tools that were not taken, by status.");
    describe_counter!("electron_mcp_connects_total", "Connections to MCP servers by what came of them.");
    describe_counter!("electron_agent_reloads_total", "Agents that were read again, by what came of it.");
    describe_histogram!(
        "electron_tool_seconds",
        Unit::Seconds,
        "From a call to its outcome, by agent, kind of tool and result."
    );
    describe_gauge!("electron_queue_length", "Turns that wait for a slot.");
    describe_gauge!("electron_sessions", "Sessions, with and without a connection.");
    describe_gauge!("electron_websockets", "Open WebSockets.");
    describe_gauge!("electron_running", "Turns and warm-ups that run.");
    describe_gauge!("electron_prefix_cache_bytes", Unit::Bytes, "What the prefix cache may hold at this moment.");
    describe_histogram!(
        "electron_time_to_first_token_seconds",
        Unit::Seconds,
        "From the request to the first word or call; calls tells turns that called tools."
    );
    describe_histogram!(
        "electron_filler_delay_seconds",
        Unit::Seconds,
        "From the token that opens a call to the phrase from the book being handed to the connection."
    );
    describe_histogram!("electron_turn_seconds", Unit::Seconds, "From the request to the end of its turn.");
}
