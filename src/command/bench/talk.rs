//! A WebSocket client for measurements.

use std::time::Duration;

use futures::{SinkExt, StreamExt};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_tungstenite::{
    WebSocketStream, client_async_with_config,
    tungstenite::{Message, client::IntoClientRequest, http::HeaderValue, protocol::WebSocketConfig},
};

/// Longest that a measurement waits for one event.
const PATIENCE: Duration = Duration::from_secs(120);

/// A connection to a server.
pub(super) struct Talk(WebSocketStream<TcpStream>);

impl Talk {
    /// Connects to a path of a server such as `http://127.0.0.1:8080`.
    pub(super) async fn connect(url: &str, path: &str, key: &str) -> Result<Self, String> {
        let Some(address) = url.strip_prefix("http://") else {
            return Err(format!("{url}: sessions are measured over plain http:// only"));
        };
        let mut request = format!("ws://{address}{path}").into_client_request().map_err(|e| e.to_string())?;
        let bearer = HeaderValue::from_str(&format!("Bearer {key}")).map_err(|e| e.to_string())?;
        request.headers_mut().insert("authorization", bearer);
        let stream = TcpStream::connect(address).await.map_err(|e| format!("{url}: {e}"))?;
        stream.set_nodelay(true).map_err(|e| e.to_string())?;
        let config = WebSocketConfig::default().read_buffer_size(1 << 10).write_buffer_size(0);
        let connected = tokio::time::timeout(PATIENCE, client_async_with_config(request, stream, Some(config))).await;
        let (socket, _) = connected.map_err(|_| "no answer".to_owned())?.map_err(|e| format!("{url}: {e}"))?;
        Ok(Self(socket))
    }

    /// Sends an event.
    pub(super) async fn send(&mut self, event: &Value) -> Result<(), String> {
        self.0.send(Message::text(event.to_string())).await.map_err(|e| e.to_string())
    }

    /// The next event; an error event is an error.
    pub(super) async fn next(&mut self) -> Result<Value, String> {
        loop {
            let next = tokio::time::timeout(PATIENCE, self.0.next()).await.map_err(|_| "no event came".to_owned())?;
            match next {
                Some(Ok(Message::Text(text))) => {
                    let event: Value = serde_json::from_str(&text).map_err(|e| e.to_string())?;
                    if event["type"] == "error" {
                        return Err(event["error"]["message"].as_str().unwrap_or_default().to_owned());
                    }
                    return Ok(event);
                }
                Some(Ok(Message::Close(frame))) => return Err(format!("the server closed the connection: {frame:?}")),
                Some(Ok(_)) => {}
                Some(Err(e)) => return Err(e.to_string()),
                None => return Err("the connection ended".into()),
            }
        }
    }

    /// The next event of one of these types.
    pub(super) async fn until(&mut self, kinds: &[&str]) -> Result<Value, String> {
        loop {
            let event = self.next().await?;
            if event["type"].as_str().is_some_and(|kind| kinds.contains(&kind)) {
                return Ok(event);
            }
        }
    }

    /// Answers pings until the connection ends.
    pub(super) async fn idle(mut self) {
        while let Some(Ok(_)) = self.0.next().await {}
    }
}
