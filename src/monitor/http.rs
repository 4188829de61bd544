//! Owns: the HTTP server: who may ask, what is answered, and that no client can hold anything for long.
//! Does not own: the answers' content (`health.rs`, `status.rs`, `exposition.rs`).
//!
//! For reading only: nothing can be told to the agent over the network.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use aws_lc_rs::{constant_time, digest};
use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::exposition::Exposition;
use super::health::ClusterFacts;
use super::status::{Answer, SCHEMA};
use crate::error::{ExitCode, Failure};

/// A scraper, a few people, probes. More than this wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 64;
/// For a request's header; a connection without a request is closed after it.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection ends after its current answer then, and in any case a little later: whoever reads slowly, or nothing,
/// does not keep it.
const CONNECTION_TIME: Duration = Duration::from_secs(60);
const CLOSING_TIME: Duration = Duration::from_secs(10);
const HEADER_BYTES_MAX: usize = 16 << 10;
const HEADERS_MAX: usize = 64;
/// A token that was replaced is taken after this.
const TOKEN_KEPT: Duration = Duration::from_secs(10);
const TOKEN_BYTES_MAX: usize = 4096;

/// Who knows about the clusters.
pub trait Source: Send + Sync + std::fmt::Debug {
    fn facts(&self) -> Vec<ClusterFacts>;
    /// Whether every cluster's agent was started, and none was told to stop.
    fn is_ready(&self) -> bool;
}

/// A listening server.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    token: Option<Token>,
}

impl Server {
    pub async fn bind(listen: SocketAddr, token_file: Option<PathBuf>) -> Result<Server, Failure> {
        let token = token_file.map(Token::load).transpose()?;
        let listener = TcpListener::bind(listen).await.map_err(|error| refused(listen, &error))?;
        Ok(Server { listener, token })
    }

    pub fn address(&self) -> Option<SocketAddr> {
        self.listener.local_addr().ok()
    }

    /// Answers for as long as the process lives.
    pub async fn serve(self, source: Arc<dyn Source>, exposition: Exposition) {
        let site = Arc::new(Site { source, exposition, token: self.token });
        let service = TowerToHyperService::new(router(site));
        let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        loop {
            let permit = permits.clone().acquire_owned().await.expect("the semaphore is never closed");
            let stream = match self.listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of descriptors, most likely: they come back.
                    tracing::debug!(%error, "could not accept an HTTP connection");
                    tokio::time::sleep(Duration::from_millis(500)).await;
                    continue;
                }
            };
            let service = service.clone();
            tokio::spawn(async move {
                serve_connection(stream, service).await;
                drop(permit);
            });
        }
    }
}

async fn serve_connection(stream: TcpStream, service: TowerToHyperService<Router>) {
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(HEADER_BYTES_MAX)
        .max_headers(HEADERS_MAX);
    let mut connection = std::pin::pin!(builder.serve_connection(TokioIo::new(stream), service));
    let ended = tokio::select! {
        ended = connection.as_mut() => Some(ended),
        () = tokio::time::sleep(CONNECTION_TIME) => None,
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            connection.as_mut().graceful_shutdown();
            tokio::time::timeout(CLOSING_TIME, connection).await.unwrap_or(Ok(()))
        }
    };
    if let Err(error) = ended {
        tracing::trace!(%error, "an HTTP connection ended");
    }
}

fn refused(listen: SocketAddr, error: &std::io::Error) -> Failure {
    let (code, hint) = match error.kind() {
        ErrorKind::AddrInUse => {
            (ExitCode::Unavailable, "another process listens there: another agent? Choose another port in http.listen")
        }
        ErrorKind::AddrNotAvailable => (ExitCode::Config, "http.listen is no address of this machine"),
        ErrorKind::PermissionDenied => (ExitCode::Config, "ports below 1024 need a privilege: choose another"),
        _ => (ExitCode::Unavailable, "is http.listen right?"),
    };
    Failure::new(code, format!("could not listen on {listen}: {error}")).hint(hint)
}

/// The bearer token, by its digest: two of any length are compared in the same time.
struct Token {
    path: PathBuf,
    known: Mutex<(Instant, digest::Digest)>,
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Token").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Token {
    fn load(path: PathBuf) -> Result<Token, Failure> {
        let digest = Token::read(&path)?;
        Ok(Token { path, known: Mutex::new((Instant::now(), digest)) })
    }

    fn read(path: &std::path::Path) -> Result<digest::Digest, Failure> {
        let place = path.display();
        let text = std::fs::read(path).map_err(|error| {
            let code = match error.kind() {
                ErrorKind::PermissionDenied => ExitCode::Permission,
                _ => ExitCode::Config,
            };
            Failure::new(code, format!("could not read http.token_file {place}: {error}"))
        })?;
        let token = text.strip_suffix(b"\n").unwrap_or(&text);
        if token.is_empty() || token.len() > TOKEN_BYTES_MAX || !token.iter().all(u8::is_ascii_graphic) {
            let message = format!("http.token_file {place} holds no token");
            return Err(Failure::new(ExitCode::Config, message)
                .hint("one line of letters, digits and signs without blanks, such as `openssl rand -hex 32` prints"));
        }
        Ok(digest::digest(&digest::SHA256, token))
    }

    /// The file is looked at again now and then, so that a token can be replaced; one that cannot be read keeps the
    /// old one valid.
    fn is_given(&self, headers: &HeaderMap) -> bool {
        let expected = {
            let mut known = self.known.lock().expect("no holder panics");
            if known.0.elapsed() >= TOKEN_KEPT {
                let digest = Token::read(&self.path).unwrap_or_else(|error| {
                    tracing::warn!(hint = error.hint, "{error}; the token known before stays");
                    known.1
                });
                *known = (Instant::now(), digest);
            }
            known.1
        };
        let given = headers.get(header::AUTHORIZATION).map(|value| value.as_bytes()).unwrap_or_default();
        let Some((scheme, token)) = given.split_first_chunk::<7>() else { return false };
        let given = digest::digest(&digest::SHA256, token.trim_ascii());
        let is_equal = constant_time::verify_slices_are_equal(given.as_ref(), expected.as_ref()).is_ok();
        is_equal && scheme.eq_ignore_ascii_case(b"bearer ")
    }
}

#[derive(Debug)]
struct Site {
    source: Arc<dyn Source>,
    exposition: Exposition,
    token: Option<Token>,
}

impl Site {
    /// For everything but the probes.
    fn guard(&self, headers: &HeaderMap, answer: impl FnOnce() -> Response) -> Response {
        match &self.token {
            Some(token) if !token.is_given(headers) => {
                let challenge = [(header::WWW_AUTHENTICATE, "Bearer realm=\"seawall\"")];
                (StatusCode::UNAUTHORIZED, challenge, "the bearer token is missing or wrong\n").into_response()
            }
            _ => answer(),
        }
    }
}

fn router(site: Arc<Site>) -> Router {
    Router::new()
        .route("/", get(page))
        .route("/metrics", get(metrics))
        .route("/status", get(status))
        .route("/protected", get(protected))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .fallback(|| async { (StatusCode::NOT_FOUND, "there is no such page; see /\n") })
        .with_state(site)
}

async fn healthz() -> &'static str {
    "ok\n"
}

async fn readyz(State(site): State<Arc<Site>>) -> Response {
    match site.source.is_ready() {
        true => "ready\n".into_response(),
        false => (StatusCode::SERVICE_UNAVAILABLE, "starting or stopping\n").into_response(),
    }
}

async fn metrics(State(site): State<Arc<Site>>, headers: HeaderMap) -> Response {
    site.guard(&headers, || {
        let kind = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
        (kind, site.exposition.render(&site.source.facts())).into_response()
    })
}

async fn status(State(site): State<Arc<Site>>, headers: HeaderMap) -> Response {
    site.guard(&headers, || {
        let clusters = site.source.facts().iter().map(ClusterFacts::to_status).collect();
        json_of(StatusCode::OK, &Answer { schema: SCHEMA, source: "agent".to_string(), clusters })
    })
}

/// 503 as soon as one cluster is not protected, with the reasons of each.
async fn protected(State(site): State<Arc<Site>>, headers: HeaderMap) -> Response {
    site.guard(&headers, || {
        let mut all = true;
        let mut clusters = Vec::new();
        for facts in site.source.facts() {
            let findings = facts.findings().into_iter().filter(|finding| finding.exposes);
            let reasons: Vec<String> = findings.map(|finding| finding.text).collect();
            all &= reasons.is_empty();
            clusters.push(json!({ "name": facts.name, "protected": reasons.is_empty(), "reasons": reasons }));
        }
        let code = if all { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        json_of(code, &json!({ "schema": SCHEMA, "protected": all, "clusters": clusters }))
    })
}

fn json_of(code: StatusCode, answer: &impl serde::Serialize) -> Response {
    let body = serde_json::to_string_pretty(answer).expect("our answers have string keys and no failing serializers");
    let headers = [(header::CONTENT_TYPE, "application/json"), (header::CACHE_CONTROL, "no-store")];
    (code, headers, body + "\n").into_response()
}

async fn page(State(site): State<Arc<Site>>, headers: HeaderMap) -> Response {
    site.guard(&headers, || {
        let page = PAGE.replace("VERSION", env!("CARGO_PKG_VERSION"));
        let policy = [(header::CONTENT_SECURITY_POLICY, "default-src 'none'; style-src 'unsafe-inline'")];
        (policy, Html(page)).into_response()
    })
}

const PAGE: &str = "<!doctype html>
<html lang=\"en\"><meta charset=\"utf-8\"><title>Seawall</title>
<style>body{font:16px/1.5 system-ui,sans-serif;max-width:44em;margin:3em auto;padding:0 1em}</style>
<h1>Seawall VERSION</h1>
<ul>
<li><a href=\"/status\">/status</a>: every cluster, as <code>seawall status --json</code> says it
<li><a href=\"/protected\">/protected</a>: 200, or 503 with the reasons; for alerts
<li><a href=\"/metrics\">/metrics</a>: for Prometheus
<li><a href=\"/healthz\">/healthz</a>, <a href=\"/readyz\">/readyz</a>: the process is up, its agents are started; for probes
</ul>
";

#[cfg(test)]
mod tests {
    use super::*;

    fn header(value: &str) -> HeaderMap {
        HeaderMap::from_iter([(header::AUTHORIZATION, value.parse().unwrap())])
    }

    #[test]
    fn only_the_token_opens() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for bad in ["", "\n", "two words\n"] {
            std::fs::write(file.path(), bad).unwrap();
            let refused = Token::load(file.path().to_path_buf()).unwrap_err();
            assert!(refused.exit_code == ExitCode::Config && refused.hint.is_some(), "{refused}");
        }
        std::fs::write(file.path(), "canary\n").unwrap();
        let token = Token::load(file.path().to_path_buf()).unwrap();
        assert!(token.is_given(&header("Bearer canary")) && token.is_given(&header("bearer  canary")));
        for wrong in
            ["", "Bearer", "Bearer ", "Bearer canar", "Bearer canaryy", "Basic  canary", "canary", "Bearercanary"]
        {
            assert!(!token.is_given(&header(wrong)), "{wrong}");
        }
        assert!(!token.is_given(&HeaderMap::new()));
        assert!(!format!("{token:?}").contains("canary"));
        assert_eq!(Token::load("/no/such/file".into()).unwrap_err().exit_code, ExitCode::Config);
    }

    #[tokio::test]
    async fn an_address_that_cannot_be_had_says_why() {
        let taken = Server::bind("127.0.0.1:0".parse().unwrap(), None).await.unwrap();
        let again = Server::bind(taken.address().unwrap(), None).await.unwrap_err();
        assert_eq!(again.exit_code, ExitCode::Unavailable);
        assert!(again.hint.unwrap().contains("another process"));
        let elsewhere = Server::bind("192.0.2.1:9187".parse().unwrap(), None).await.unwrap_err();
        assert_eq!(elsewhere.exit_code, ExitCode::Config);
    }
}
