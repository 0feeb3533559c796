//! Questions to services that users name: judges and rewards. Addresses are checked, names are resolved once and
//! connected to as they were checked, redirects are not followed, and neither size nor time is the other side's.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use reqwest::{
    Client, Response, StatusCode, Url,
    dns::{Addrs, Name, Resolve, Resolving},
    header::RETRY_AFTER,
    redirect,
};
use serde_json::Value;

use super::reach::{Reach, is_public, private};

/// The longest answer, in bytes.
const MAX_ANSWER: usize = 1 << 20;
/// The longest that a service may ask us to wait before the next attempt.
const MAX_PAUSE: Duration = Duration::from_secs(20);

/// How services are asked.
#[derive(Clone, Debug)]
pub struct WebSettings {
    pub reach: Reach,
    /// Of one attempt, from its connection to its last byte.
    pub timeout: Duration,
    pub attempts: u32,
    /// Before the second attempt; doubled for each that follows, times a random number around 1.
    pub pause: Duration,
}

impl Default for WebSettings {
    fn default() -> Self {
        Self {
            reach: Reach::default(),
            timeout: Duration::from_secs(60),
            attempts: 3,
            pause: Duration::from_millis(500),
        }
    }
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{0}")]
pub struct WebError(pub String);

/// Asks services. Cheap to clone.
#[derive(Clone)]
pub struct Web {
    settings: Arc<WebSettings>,
    /// For hosts that the operator allows.
    trusting: Client,
    /// For all others: it connects to public addresses alone.
    wary: Client,
}

impl Web {
    pub fn new(settings: WebSettings) -> Result<Self, WebError> {
        let client = || {
            // A proxy would resolve names by itself, and reach what we must not.
            let builder = Client::builder().redirect(redirect::Policy::none()).no_proxy();
            builder.timeout(settings.timeout).connect_timeout(settings.timeout.min(Duration::from_secs(10)))
        };
        let failed = |error: reqwest::Error| WebError(said(error));
        Ok(Self {
            trusting: client().build().map_err(failed)?,
            wary: client().dns_resolver(Arc::new(PublicOnly)).build().map_err(failed)?,
            settings: Arc::new(settings),
        })
    }

    /// Why an address will not be asked, as far as it can be known before.
    pub fn check(&self, address: &str) -> Result<(), WebError> {
        self.settings.reach.check(address).map(|_| ()).map_err(WebError)
    }

    /// Posts `body`, and reads what comes back. Faults that may pass, and answers that `read` has no use for, are asked
    /// for again.
    pub async fn ask<T>(
        &self,
        address: &str,
        body: &Value,
        read: impl Fn(&Value) -> Result<T, String>,
    ) -> Result<T, WebError> {
        let url = self.settings.reach.check(address).map_err(WebError)?;
        let mut attempt = 1;
        loop {
            let (why, pause) = match self.once(&url, body).await {
                Ok(answer) => match read(&answer) {
                    Ok(found) => return Ok(found),
                    Err(why) => (why, None),
                },
                Err(Fault::Final(why)) => return Err(WebError(why)),
                Err(Fault::Passing(why, pause)) => (why, pause),
            };
            if attempt >= self.settings.attempts {
                return Err(WebError(format!("{why} ({attempt} attempts)")));
            }
            let own = self.settings.pause.mul_f64(f64::from(1u32 << (attempt - 1).min(16)) * jitter());
            tokio::time::sleep(pause.unwrap_or(own).min(MAX_PAUSE)).await;
            attempt += 1;
        }
    }

    async fn once(&self, url: &Url, body: &Value) -> Result<Value, Fault> {
        let reach = &self.settings.reach;
        let client = if reach.allows(url) { &self.trusting } else { &self.wary };
        let mut request = client.post(url.clone()).json(body);
        if let Some(key) = reach.key(url) {
            request = request.bearer_auth(key);
        }
        let answer = request.send().await.map_err(|error| of_sending(url, error))?;
        let host = url.host_str().unwrap_or_default();
        let status = answer.status();
        if status.is_redirection() {
            return Err(Fault::Final(format!("{host} answers with a redirect ({status}), which is not followed")));
        }
        if !status.is_success() {
            let why = format!("{host} answers {status}");
            let may_pass = status.is_server_error()
                || [StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_MANY_REQUESTS].contains(&status);
            return Err(if may_pass { Fault::Passing(why, wait(&answer)) } else { Fault::Final(why) });
        }
        let bytes = limited(host, answer).await?;
        serde_json::from_slice(&bytes).map_err(|_| Fault::Passing(format!("{host} answers with no JSON"), None))
    }
}

enum Fault {
    /// Another attempt would end alike.
    Final(String),
    /// With the pause that the service asks for.
    Passing(String, Option<Duration>),
}

fn wait(answer: &Response) -> Option<Duration> {
    let seconds = answer.headers().get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds))
}

async fn limited(host: &str, mut answer: Response) -> Result<Vec<u8>, Fault> {
    let mut bytes = Vec::new();
    let broken = |error| Fault::Passing(format!("{host}: {}", said(error)), None);
    while let Some(part) = answer.chunk().await.map_err(broken)? {
        if bytes.len() + part.len() > MAX_ANSWER {
            return Err(Fault::Final(format!("{host} answers with more than {MAX_ANSWER} bytes")));
        }
        bytes.extend_from_slice(&part);
    }
    Ok(bytes)
}

fn of_sending(url: &Url, error: reqwest::Error) -> Fault {
    let host = url.host_str().unwrap_or_default();
    let mut source = std::error::Error::source(&error);
    while let Some(inner) = source {
        if inner.is::<NotPublic>() {
            return Fault::Final(private(host));
        }
        source = inner.source();
    }
    Fault::Passing(format!("{host}: {}", said(error)), None)
}

/// The kind of fault without addresses, paths and what else its text may carry.
fn said(error: reqwest::Error) -> String {
    let kind = if error.is_timeout() {
        "no answer in time"
    } else if error.is_connect() {
        "no connection"
    } else if error.is_builder() {
        "the request cannot be made"
    } else {
        "the connection broke"
    };
    kind.to_owned()
}

#[derive(Debug, thiserror::Error)]
#[error("not at a public address")]
struct NotPublic;

/// Resolves names to public addresses. What it gives is what is connected to: a name that means something else the
/// next moment (rebinding) changes nothing.
struct PublicOnly;

impl Resolve for PublicOnly {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let found: Vec<SocketAddr> = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            if found.iter().any(|address| !is_public(address.ip())) {
                return Err(NotPublic.into());
            }
            Ok(Box::new(found.into_iter()) as Addrs)
        })
    }
}

/// Between ½ and 1½: many who failed together do not come back together.
fn jitter() -> f64 {
    let mut byte = [0];
    // Without randomness there is no jitter.
    _ = getrandom::fill(&mut byte);
    0.5 + f64::from(byte[0]) / 255.0
}
