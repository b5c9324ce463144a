//! The one error type of the program: its HTTP status, its wire names, its wording.

use std::{borrow::Cow, time::Duration};

use serde::Serialize;

/// What can go wrong between a request and its last token.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The request breaks the contract; every fault that was found is listed.
    #[error("{}", invalid_message(.0))]
    Invalid(Vec<Fault>),
    /// Prompt and answer do not fit the model.
    #[error(
        "This model's maximum context length is {context} tokens. However, your messages resulted in {prompt} \
         tokens{}. Shorten the conversation or the tools, or ask for fewer tokens.",
        .asked.map(|n| format!(" and {n} more were asked for")).unwrap_or_default()
    )]
    ContextLength {
        /// Tokens that prompt and answer may have together.
        context: usize,
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens that the caller wanted to be generated, where that is what does not fit.
        asked: Option<usize>,
        /// The field of the request that is too large.
        param: &'static str,
    },
    /// No model is served under this name.
    #[error("The model `{0}` does not exist. GET /v1/models lists those that are served here.")]
    ModelNotFound(String),
    /// The key is missing or unknown.
    #[error("{0}")]
    Unauthenticated(&'static str),
    /// The key is known but may not do this.
    #[error("{0}")]
    Forbidden(String),
    /// No such route or object.
    #[error("{0}")]
    NotFound(String),
    /// The route exists, the method does not.
    #[error("{0}")]
    MethodNotAllowed(String),
    /// It does not fit what is going on at the moment.
    #[error("{message}")]
    Conflict {
        /// A name for programs to branch on.
        code: &'static str,
        /// What is going on, and what to do.
        message: String,
    },
    /// A call that is said to have a result has its outcome already.
    #[error("{0}")]
    Settled(String),
    /// The response to continue is not kept, or not the caller's.
    #[error("Previous response with id '{0}' not found. Send the whole conversation without it.")]
    PreviousResponseNotFound(String),
    /// The route is a WebSocket, and the request none.
    #[error("{0}")]
    UpgradeRequired(String),
    /// The body is larger than the server reads.
    #[error("The request body is larger than the limit of {limit} bytes.")]
    BodyTooLarge {
        /// The limit in bytes.
        limit: usize,
    },
    /// The key's requests per minute or its concurrency are used up.
    #[error("{message}")]
    RateLimited {
        /// Which limit, and what to do.
        message: &'static str,
        /// When to try again.
        retry_after: Duration,
    },
    /// The model failed in the middle of its work.
    #[error("The model failed: {0}")]
    EngineFailed(String),
    /// The queue is full, or the model is not ready.
    #[error("{message}")]
    Overloaded {
        /// What is the matter.
        message: Cow<'static, str>,
        /// When to try again.
        retry_after: Duration,
    },
    /// A defect of the server.
    #[error("Internal error. The request id leads to it in the server's log.")]
    Internal(String),
}

/// One thing that is wrong with a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Fault {
    /// Kind of fault, `custom` unless a standard kind fits.
    pub code: &'static str,
    /// What is wrong and what is allowed.
    pub message: String,
    /// Where: field names and indices from the top of the body.
    pub path: Vec<PathPart>,
}

/// A step of a [`Fault`]'s path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum PathPart {
    /// A field of an object.
    Field(Cow<'static, str>),
    /// A position in a list.
    Index(usize),
}

// === impl Error ===

impl Error {
    /// A request with one fault in one top-level field.
    pub fn invalid(field: &'static str, message: impl Into<String>) -> Self {
        Self::Invalid(vec![Fault::new([field.into()], message)])
    }

    /// The same error in a part of a larger request: the paths of its faults begin with these steps.
    #[must_use]
    pub fn under(mut self, path: &[PathPart]) -> Self {
        if let Self::Invalid(faults) = &mut self {
            for fault in faults {
                fault.path.splice(0..0, path.iter().cloned());
            }
        }
        self
    }

    /// The HTTP status.
    pub fn status(&self) -> u16 {
        match self {
            // Not 409 for a conflict: SDKs take that as a reason to try the same again.
            Self::Invalid(_)
            | Self::Conflict { .. }
            | Self::ContextLength { .. }
            | Self::ModelNotFound(_)
            | Self::PreviousResponseNotFound(_) => 400,
            Self::Unauthenticated(_) => 401,
            Self::Forbidden(_) => 403,
            Self::NotFound(_) => 404,
            Self::MethodNotAllowed(_) => 405,
            Self::Settled(_) => 409,
            Self::BodyTooLarge { .. } => 413,
            Self::UpgradeRequired(_) => 426,
            Self::RateLimited { .. } => 429,
            Self::Internal(_) => 500,
            Self::EngineFailed(_) => 502,
            Self::Overloaded { .. } => 503,
        }
    }

    /// OpenAI's name for the class of error.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Unauthenticated(_) => "authentication_error",
            Self::Forbidden(_) => "permission_error",
            Self::RateLimited { .. } => "rate_limit_error",
            Self::EngineFailed(_) | Self::Internal(_) => "api_error",
            Self::Overloaded { .. } => "overloaded_error",
            _ => "invalid_request_error",
        }
    }

    /// A name for programs to branch on, where the class is not enough.
    pub fn code(&self) -> Option<&'static str> {
        match self {
            Self::ContextLength { .. } => Some("context_length_exceeded"),
            Self::ModelNotFound(_) => Some("model_not_found"),
            Self::PreviousResponseNotFound(_) => Some("previous_response_not_found"),
            Self::Conflict { code, .. } => Some(code),
            Self::Settled(_) => Some("tool_call_already_settled"),
            Self::Unauthenticated(_) => Some("invalid_api_key"),
            _ => None,
        }
    }

    /// The field that is at fault, as a dotted path.
    pub fn param(&self) -> Option<String> {
        match self {
            Self::Invalid(faults) => faults.first().map(Fault::dotted).filter(|p| !p.is_empty()),
            Self::ContextLength { param, .. } => Some((*param).to_owned()),
            Self::ModelNotFound(_) => Some("model".into()),
            Self::PreviousResponseNotFound(_) => Some("previous_response_id".into()),
            _ => None,
        }
    }

    /// The faults of an invalid request.
    pub fn faults(&self) -> &[Fault] {
        match self {
            Self::Invalid(faults) => faults,
            _ => &[],
        }
    }

    /// When a client may try again.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::RateLimited { retry_after, .. } | Self::Overloaded { retry_after, .. } => Some(*retry_after),
            _ => None,
        }
    }

    /// The error object of every dialect.
    pub fn body(&self, request_id: &str) -> ErrorBody {
        ErrorBody {
            error: ErrorObject {
                message: self.to_string(),
                kind: self.kind(),
                code: self.code(),
                param: self.param(),
                details: self.faults().to_vec(),
                request_id: request_id.to_owned(),
            },
        }
    }
}

fn invalid_message(faults: &[Fault]) -> String {
    let told: Vec<String> = faults.iter().take(3).map(Fault::told).collect();
    let more = faults.len().saturating_sub(told.len());
    let tail = if more > 0 { format!(" (and {more} more)") } else { String::new() };
    format!("Invalid input data: {}{tail}", told.join("; "))
}

// === impl Fault ===

impl Fault {
    /// A fault at a path.
    pub fn new(path: impl IntoIterator<Item = PathPart>, message: impl Into<String>) -> Self {
        Self { code: "custom", message: message.into(), path: path.into_iter().collect() }
    }

    fn dotted(&self) -> String {
        let mut out = String::new();
        for part in &self.path {
            match part {
                PathPart::Field(name) if out.is_empty() => out.push_str(name),
                PathPart::Field(name) => {
                    out.push('.');
                    out.push_str(name);
                }
                PathPart::Index(i) => out.push_str(&format!("[{i}]")),
            }
        }
        out
    }

    /// The message with the field's name in front, unless it is in it already.
    fn told(&self) -> String {
        let path = self.dotted();
        if path.is_empty() || self.message.contains(&path) {
            self.message.clone()
        } else {
            format!("{path}: {}", self.message)
        }
    }
}

impl PathPart {
    /// The name, if it is a field.
    pub fn field(&self) -> Option<&str> {
        match self {
            Self::Field(name) => Some(name),
            Self::Index(_) => None,
        }
    }
}

impl From<&'static str> for PathPart {
    fn from(name: &'static str) -> Self {
        Self::Field(Cow::Borrowed(name))
    }
}

impl From<String> for PathPart {
    fn from(name: String) -> Self {
        Self::Field(Cow::Owned(name))
    }
}

impl From<usize> for PathPart {
    fn from(index: usize) -> Self {
        Self::Index(index)
    }
}

/// The error body that clients of every dialect get.
#[derive(Debug, Serialize)]
pub struct ErrorBody {
    error: ErrorObject,
}

#[derive(Debug, Serialize)]
struct ErrorObject {
    message: String,
    #[serde(rename = "type")]
    kind: &'static str,
    code: Option<&'static str>,
    param: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    details: Vec<Fault>,
    request_id: String,
}
