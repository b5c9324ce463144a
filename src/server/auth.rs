//! Who calls, and how much they may.
//!
//! Keys are random and long, so a plain SHA-256 keeps them as well as a slow hash would. They are compared in constant
//! time.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use axum::{
    body::Body,
    extract::{Request, State},
    http::{HeaderMap, Response, header},
    middleware::Next,
};
use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use dashmap::DashMap;
use rand::{TryRngCore, rngs::OsRng};
use sha2::{Digest, Sha256};
use subtle::{ConditionallySelectable, ConstantTimeEq};

use super::App;
use crate::{
    config,
    error::Error,
    session::{Owner, Settings},
};

/// All keys.
pub(super) struct Auth {
    keys: Vec<Arc<Account>>,
    /// Short-lived keys that browsers use, by their hash.
    secrets: DashMap<[u8; 32], Secret>,
}

/// A short-lived key that opens realtime sessions with these settings.
struct Secret {
    account: Arc<Account>,
    settings: Arc<Settings>,
    until: Instant,
}

/// Most short-lived keys at once.
const MOST_SECRETS: usize = 10_000;
/// With this in front a browser gives its key as a WebSocket subprotocol, since it can set no header.
const KEY_PROTOCOL: &str = "openai-insecure-api-key.";

/// A key and what is used of its limits.
#[derive(Debug)]
struct Account {
    name: String,
    /// Of the hash, so that it is the same after a restart and another for every key.
    owner: Owner,
    hash: [u8; 32],
    models: Vec<String>,
    requests_per_minute: u32,
    concurrency: u32,
    running: AtomicU32,
    bucket: Mutex<Bucket>,
}

/// Requests that may still be made; it fills up evenly.
#[derive(Debug)]
struct Bucket {
    left: f64,
    filled: Instant,
}

/// Who makes this request.
#[derive(Clone, Debug)]
pub(super) struct Caller {
    account: Arc<Account>,
    /// Of a short-lived key, the settings of the sessions that it opens.
    secret: Option<Arc<Settings>>,
}

/// A running request of a key; dropping it makes room for another.
pub(super) struct Permit(Arc<Account>);

/// A new random key.
///
/// # Errors
/// When the system has no randomness to give.
pub fn new_key() -> Result<String, String> {
    let mut bytes = [0u8; 32];
    OsRng.try_fill_bytes(&mut bytes).map_err(|e| format!("the system's random source failed: {e}"))?;
    Ok(format!("egw_{}", BASE64_URL_SAFE_NO_PAD.encode(bytes)))
}

/// A key as the configuration holds it.
pub fn hash_key(key: &str) -> String {
    let hex: String = Sha256::digest(key).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// Lets a request through when its key is known.
pub(super) async fn authenticate(
    State(app): State<Arc<App>>,
    mut request: Request,
    next: Next,
) -> Result<Response<Body>, Error> {
    let key = given_key(request.headers())?;
    let caller = app.auth.find(&key).ok_or(Error::Unauthenticated("Incorrect API key provided."))?;
    if caller.secret.is_some() && !request.uri().path().ends_with("/v1/realtime") {
        return Err(Error::Forbidden("A client secret opens realtime sessions and nothing else.".into()));
    }
    tracing::Span::current().record("key", caller.account.name.as_str());
    request.extensions_mut().insert(caller);
    Ok(next.run(request).await)
}

/// The key in a request's headers.
pub(super) fn given_key(headers: &HeaderMap) -> Result<String, Error> {
    if let Some(header) = headers.get(header::AUTHORIZATION) {
        let key = header.to_str().ok().and_then(|value| {
            let (scheme, key) = value.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then_some(key.trim())
        });
        return key
            .map(str::to_owned)
            .ok_or(Error::Unauthenticated("The Authorization header has to read: Bearer KEY."));
    }
    let protocols = headers.get_all(header::SEC_WEBSOCKET_PROTOCOL).iter().filter_map(|value| value.to_str().ok());
    let key = protocols.flat_map(|list| list.split(',')).find_map(|name| name.trim().strip_prefix(KEY_PROTOCOL));
    key.map(str::to_owned)
        .ok_or(Error::Unauthenticated("You didn't provide an API key. Send it in a header: Authorization: Bearer KEY."))
}

// === impl Auth ===

impl Auth {
    pub(super) fn new(keys: &[config::Key], extra: Option<&str>) -> Self {
        let account = |key: &config::Key, hash: [u8; 32]| {
            Arc::new(Account {
                name: key.name.clone(),
                owner: BASE64_URL_SAFE_NO_PAD.encode(&hash[..16]).into(),
                hash,
                models: key.models.clone(),
                requests_per_minute: key.requests_per_minute,
                concurrency: key.concurrency,
                running: AtomicU32::new(0),
                bucket: Mutex::new(Bucket { left: f64::from(key.requests_per_minute), filled: Instant::now() }),
            })
        };
        let configured = keys.iter().filter_map(|key| Some(account(key, unhex(key.hash.strip_prefix("sha256:")?)?)));
        let extra = extra.map(|key| {
            let unnamed = config::Key { name: "startup".into(), ..config::Key::default() };
            account(&unnamed, Sha256::digest(key).into())
        });
        Self { keys: configured.chain(extra).collect(), secrets: DashMap::new() }
    }

    /// The account of a key. Every key is looked at, so that the time taken says nothing.
    pub(super) fn find(&self, key: &str) -> Option<Caller> {
        let hash: [u8; 32] = Sha256::digest(key).into();
        let mut found = u32::MAX;
        for (i, account) in self.keys.iter().enumerate() {
            found.conditional_assign(&(i as u32), account.hash.ct_eq(&hash));
        }
        if let Some(account) = self.keys.get(found as usize) {
            return Some(Caller { account: account.clone(), secret: None });
        }
        // Looked up by hash: what the time taken tells is no part of the key.
        let secret = self.secrets.get(&hash).filter(|secret| secret.until > Instant::now())?;
        Some(Caller { account: secret.account.clone(), secret: Some(secret.settings.clone()) })
    }

    /// The account of the key with this name, the first one for no name: for calls of platforms that bring no key.
    pub(super) fn named(&self, name: &str) -> Option<Caller> {
        let found = self.keys.iter().find(|account| name.is_empty() || account.name == name)?;
        Some(Caller { account: found.clone(), secret: None })
    }

    /// A key that opens realtime sessions with these settings for so many seconds.
    pub(super) fn new_secret(&self, caller: &Caller, settings: Settings, seconds: u64) -> Result<String, Error> {
        let now = Instant::now();
        if self.secrets.len() >= MOST_SECRETS {
            self.secrets.retain(|_, secret| secret.until > now);
        }
        if self.secrets.len() >= MOST_SECRETS {
            return Err(Error::RateLimited {
                message: "Too many client secrets are in use. Wait until some have expired.",
                retry_after: Duration::from_secs(10),
            });
        }
        let key = new_key().map_err(Error::Internal)?.replacen("egw_", "ek_", 1);
        let until = now + Duration::from_secs(seconds);
        let secret = Secret { account: caller.account.clone(), settings: Arc::new(settings), until };
        self.secrets.insert(Sha256::digest(&key).into(), secret);
        Ok(key)
    }
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0u8; 32];
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * i..2 * i + 2)?, 16).ok()?;
    }
    Some(bytes)
}

// === impl Caller ===

impl Caller {
    /// What its sessions are known by.
    pub(super) fn owner(&self) -> Owner {
        self.account.owner.clone()
    }

    /// Of a short-lived key, the settings of the sessions that it opens.
    pub(super) fn secret(&self) -> Option<&Settings> {
        self.secret.as_deref()
    }

    /// Whether this key may use a model.
    pub(super) fn check_model(&self, model: &str) -> Result<(), Error> {
        if self.account.models.is_empty() || self.account.models.iter().any(|allowed| allowed == model) {
            Ok(())
        } else {
            Err(Error::Forbidden(format!("This key may not use the model `{model}`.")))
        }
    }

    /// Counts a request against the key's limits.
    pub(super) fn admit(&self) -> Result<Permit, Error> {
        self.admit_at(Instant::now())
    }

    fn admit_at(&self, now: Instant) -> Result<Permit, Error> {
        let account = &self.account;
        let running = account.running.fetch_add(1, Ordering::AcqRel) + 1;
        let permit = Permit(account.clone());
        if account.concurrency > 0 && running > account.concurrency {
            return Err(Error::RateLimited {
                message: "Concurrency limit reached. Wait for a running request of this key to end.",
                retry_after: Duration::from_secs(1),
            });
        }
        if account.requests_per_minute > 0 {
            let per_second = f64::from(account.requests_per_minute) / 60.0;
            let mut bucket = account.bucket.lock().unwrap_or_else(PoisonError::into_inner);
            let gained = now.duration_since(bucket.filled).as_secs_f64() * per_second;
            bucket.left = (bucket.left + gained).min(f64::from(account.requests_per_minute));
            bucket.filled = now;
            if bucket.left < 1.0 {
                let wait = Duration::from_secs_f64((1.0 - bucket.left) / per_second);
                return Err(Error::RateLimited {
                    message: "Rate limit reached: the requests per minute of this key are used up.",
                    retry_after: wait,
                });
            }
            bucket.left -= 1.0;
        }
        Ok(permit)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn auth(requests_per_minute: u32, concurrency: u32) -> Auth {
        let key = config::Key {
            name: "a".into(),
            hash: hash_key("secret"),
            models: vec!["one".into()],
            requests_per_minute,
            concurrency,
        };
        Auth::new(&[key], None)
    }

    #[test]
    fn a_key_is_known_by_its_hash() {
        let auth = auth(0, 0);
        assert!(auth.find("secret").is_some());
        assert!(auth.find("secre").is_none());
        assert!(auth.find("").is_none());
    }

    #[test]
    fn a_key_may_use_its_models_only() {
        let caller = auth(0, 0).find("secret").unwrap();
        assert!(caller.check_model("one").is_ok());
        assert_eq!(caller.check_model("two").unwrap_err().status(), 403);
    }

    #[test]
    fn a_permit_makes_room_when_it_is_dropped() {
        let caller = auth(0, 1).find("secret").unwrap();
        let permit = caller.admit().unwrap();
        assert!(caller.admit().is_err());
        drop(permit);
        assert!(caller.admit().is_ok());
    }

    #[test]
    fn requests_come_back_over_the_minute() {
        let caller = auth(2, 0).find("secret").unwrap();
        let now = Instant::now();
        assert!(caller.admit_at(now).is_ok());
        assert!(caller.admit_at(now).is_ok());
        let refused = caller.admit_at(now).err().unwrap();
        assert_eq!(refused.retry_after().map(|wait| wait.as_secs_f64().round()), Some(30.0));
        assert!(caller.admit_at(now + Duration::from_secs(31)).is_ok());
    }

    #[test]
    fn keys_are_long_and_different() {
        let (a, b) = (new_key().unwrap(), new_key().unwrap());
        assert!(a.len() > 40 && a != b);
    }
}
