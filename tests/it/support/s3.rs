//! Owns: an S3 server in this process that can be made to fail in every way a store fails: its port, keys, clock and
//! region, what it does to an answer on its way, and what it was asked.
//! Does not own: which faults there are and what they meet (`s3_rule.rs`), what an honest answer is (`s3_memory.rs`),
//! signatures (the crate `s3s`), HTTP (`s3_http.rs`).
//!
//! ```ignore
//! let store = S3Server::start();
//! store.fault(Rule::new(Fault::error(503, "SlowDown")).on(Operation::PutObject).key(".zst").times(3));
//! let agent = …; // with `store.environment()` and `store.url()`
//! ```
//!
//! It has a thread and a real port of its own: agents that are processes reach it as well as futures of a test.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use jiff::{SignedDuration, Timestamp};
use s3s::auth::{S3Auth, SecretKey};
use s3s::config::{S3Config, StaticConfigProvider};
use s3s::service::{S3Service, S3ServiceBuilder};
use s3s::{Body, HttpRequest, S3Result, s3_error};
use socket2::{Domain, Socket, Type};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio_util::sync::CancellationToken;

use super::process;
pub use super::s3_http::Answer;
use super::s3_http::{Head, Wire};
use super::s3_memory::Memory;
pub use super::s3_memory::{Content, Stored, Unfinished};
pub use super::s3_rule::{Fault, Operation, Rule, s3_answer, s3_answer_saying};

pub const BUCKET: &str = "archive";
pub const ACCESS_KEY: &str = "seawall-access";
pub const SECRET_KEY: &str = "seawall-secret-canary";
pub const REGION: &str = "us-east-1";
/// S3 refuses requests signed further away from its own time.
const SKEW_MAX: SignedDuration = SignedDuration::from_mins(15);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RuleId(u64);

/// A request as it was answered.
#[derive(Clone, Debug)]
pub struct Seen {
    pub operation: Operation,
    pub key: String,
    /// 0 where no status was sent.
    pub status: u16,
    pub body_bytes: usize,
    /// Its conditional header, if it came with one.
    pub if_none_match: Option<String>,
    pub is_faulted: bool,
}

#[derive(Clone, Debug)]
enum KeyState {
    Valid(String),
    Expired(String),
}

struct State {
    rules: Vec<(u64, Rule)>,
    last_rule: u64,
    seen: Vec<Seen>,
    keys: BTreeMap<String, KeyState>,
    /// Our clock minus the true one.
    clock_offset: SignedDuration,
    /// Requests signed for another are refused.
    region: Option<String>,
}

struct Shared {
    state: Mutex<State>,
    service: S3Service,
    tls: Option<TlsAcceptor>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no test panics while it holds the state")
    }
}

/// The keys of [`Shared`], which the service asks for; filled after both exist.
#[derive(Clone)]
struct Keys(Arc<Mutex<std::sync::Weak<Shared>>>);

#[async_trait::async_trait]
impl S3Auth for Keys {
    async fn get_secret_key(&self, access_key: &str) -> S3Result<SecretKey> {
        let shared = self.0.lock().expect("held for a moment only").upgrade().expect("the server runs");
        match shared.lock().keys.get(access_key) {
            Some(KeyState::Valid(secret)) => Ok(SecretKey::from(secret.as_str())),
            Some(KeyState::Expired(_)) => Err(s3_error!(ExpiredToken, "The provided token has expired.")),
            None => Err(s3_error!(InvalidAccessKeyId, "The AWS Access Key Id you provided does not exist.")),
        }
    }
}

/// A running server; it ends when dropped.
pub struct S3Server {
    port: u16,
    ca_pem: Option<String>,
    memory: Memory,
    shared: Arc<Shared>,
    runtime: Option<tokio::runtime::Runtime>,
    listening: Mutex<Listening>,
}

impl fmt::Debug for S3Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "S3Server({})", self.endpoint())
    }
}

enum Listening {
    Up(CancellationToken),
    /// Keeps the port ours while nobody is let in.
    Down(Socket),
}

impl S3Server {
    /// With the bucket [`BUCKET`], empty, over plain HTTP.
    pub fn start() -> S3Server {
        S3Server::start_with(None)
    }

    /// Over TLS, with a certificate that [`S3Server::ca_pem`] has signed for 127.0.0.1.
    pub fn start_with_tls() -> S3Server {
        let names = vec!["127.0.0.1".to_owned(), "localhost".to_owned()];
        let signed = rcgen::generate_simple_self_signed(names).expect("a certificate can be made");
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(signed.signing_key.serialize_der()));
        let provider = Arc::new(tokio_rustls::rustls::crypto::aws_lc_rs::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("the provider has them")
            .with_no_client_auth()
            .with_single_cert(vec![signed.cert.der().clone()], key)
            .expect("it fits its key");
        S3Server::start_with(Some((TlsAcceptor::from(Arc::new(config)), signed.cert.pem())))
    }

    fn start_with(tls: Option<(TlsAcceptor, String)>) -> S3Server {
        let memory = Memory::new(BUCKET);
        let keys = Keys(Arc::new(Mutex::new(std::sync::Weak::new())));
        let mut builder = S3ServiceBuilder::new(memory.clone());
        builder.set_auth(keys.clone());
        // Its clock is the machine's; ours can be set.
        let mut config = S3Config::default();
        config.presigned_url_max_skew_time_secs = u32::MAX;
        builder.set_config(Arc::new(StaticConfigProvider::new(Arc::new(config))));
        let state = State {
            rules: Vec::new(),
            last_rule: 0,
            seen: Vec::new(),
            keys: BTreeMap::from([(ACCESS_KEY.to_owned(), KeyState::Valid(SECRET_KEY.to_owned()))]),
            clock_offset: SignedDuration::ZERO,
            region: None,
        };
        let (acceptor, ca_pem) = tls.map_or((None, None), |(acceptor, pem)| (Some(acceptor), Some(pem)));
        let shared = Arc::new(Shared { state: Mutex::new(state), service: builder.build(), tls: acceptor });
        *keys.0.lock().expect("nobody else has it") = Arc::downgrade(&shared);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("a runtime can be made");
        // Below the ports of outgoing connections, so that none of them has it when the server comes back.
        let socket = bound(process::claim_port(|port| bound(port).is_some())).expect("our port is free");
        let address = socket.local_addr().ok().and_then(|address| address.as_socket()).expect("it is bound");
        let listening = Mutex::new(Listening::Down(socket));
        let server = S3Server { port: address.port(), ca_pem, memory, shared, runtime: Some(runtime), listening };
        server.up();
        server
    }

    // --- How it is reached ---

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn endpoint(&self) -> String {
        let scheme = if self.ca_pem.is_some() { "https" } else { "http" };
        format!("{scheme}://127.0.0.1:{}", self.port)
    }

    pub fn ca_pem(&self) -> Option<&str> {
        self.ca_pem.as_deref()
    }

    /// What a client needs beside the endpoint.
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        environment(ACCESS_KEY, SECRET_KEY)
    }

    // --- Its life ---

    /// Takes connections, on the same port as ever.
    pub fn up(&self) {
        let mut listening = self.listening.lock().expect("held for a moment only");
        let Listening::Down(socket) = &*listening else { return };
        let socket = socket.try_clone().expect("a handle can be cloned");
        socket.listen(1024).expect("a bound socket can listen");
        let token = CancellationToken::new();
        let runtime = self.runtime.as_ref().expect("it runs until dropped");
        let (shared, stop) = (self.shared.clone(), token.clone());
        let _entered = runtime.enter();
        let listener = TcpListener::from_std(socket.into()).expect("a listening socket is a listener");
        runtime.spawn(async move { stop.run_until_cancelled(accept(listener, shared, stop.clone())).await });
        *listening = Listening::Up(token);
    }

    /// Refuses connections and ends those there are, as a host whose service has stopped does.
    pub fn down(&self) {
        let mut listening = self.listening.lock().expect("held for a moment only");
        let Listening::Up(token) = &*listening else { return };
        token.cancel();
        // The listener goes with its task; until then the address is in use.
        let placeholder = std::iter::repeat_with(|| {
            std::thread::sleep(Duration::from_millis(1));
            bound(self.port)
        });
        let placeholder = placeholder.take(100_000).flatten().next().expect("our port becomes free");
        *listening = Listening::Down(placeholder);
    }

    // --- What it does wrong ---

    pub fn fault(&self, rule: Rule) -> RuleId {
        let mut state = self.shared.lock();
        state.last_rule += 1;
        let id = state.last_rule;
        state.rules.push((id, rule));
        RuleId(id)
    }

    pub fn clear(&self, rule: RuleId) {
        self.shared.lock().rules.retain(|(id, _)| *id != rule.0);
    }

    /// Back to an honest store with the keys, clock and region it began with.
    pub fn heal(&self) {
        let mut state = self.shared.lock();
        state.rules.clear();
        state.keys = BTreeMap::from([(ACCESS_KEY.to_owned(), KeyState::Valid(SECRET_KEY.to_owned()))]);
        state.clock_offset = SignedDuration::ZERO;
        state.region = None;
        drop(state);
        let mut content = self.memory.lock();
        content.may_not_list = false;
        content.ignores_put_condition = false;
        content.ignores_complete_condition = false;
    }

    /// As a policy that lacks one action (`s3:PutObject`, …).
    pub fn deny(&self, action: &str) {
        let denied: Vec<_> = Operation::ALL.into_iter().filter(|operation| operation.action() == action).collect();
        assert!(!denied.is_empty(), "{action} is no action of ours");
        self.fault(denied.into_iter().fold(Rule::new(Fault::error(403, "AccessDenied")), Rule::on));
        if action == "s3:ListBucket" {
            self.memory.lock().may_not_list = true;
        }
    }

    /// Another pair of keys, beside those there are.
    pub fn add_key(&self, access: &str, secret: &str) {
        self.shared.lock().keys.insert(access.to_owned(), KeyState::Valid(secret.to_owned()));
    }

    pub fn remove_key(&self, access: &str) {
        self.shared.lock().keys.remove(access);
    }

    /// As temporary credentials whose time is over.
    pub fn expire_key(&self, access: &str) {
        let mut state = self.shared.lock();
        let key = state.keys.get_mut(access).expect("it was added");
        if let KeyState::Valid(secret) = key {
            *key = KeyState::Expired(std::mem::take(secret));
        }
    }

    /// Its clock goes ahead of ours by so much.
    pub fn set_clock_offset(&self, offset: SignedDuration) {
        self.shared.lock().clock_offset = offset;
    }

    /// Refuses requests signed for another region.
    pub fn set_region(&self, region: &str) {
        self.shared.lock().region = Some(region.to_owned());
    }

    // --- What it holds and what it was asked ---

    pub fn content(&self) -> MutexGuard<'_, Content> {
        self.memory.lock()
    }

    /// The bucket's objects, by key.
    pub fn objects(&self) -> BTreeMap<String, Stored> {
        self.content().buckets.get(BUCKET).map(|bucket| bucket.objects.clone()).unwrap_or_default()
    }

    pub fn unfinished(&self) -> Vec<Unfinished> {
        let content = self.content();
        content.buckets.get(BUCKET).map(|bucket| bucket.uploads.values().cloned().collect()).unwrap_or_default()
    }

    pub fn requests(&self) -> Vec<Seen> {
        self.shared.lock().seen.clone()
    }

    pub fn forget_requests(&self) {
        self.shared.lock().seen.clear();
    }

    pub fn count(&self, operation: Operation) -> usize {
        self.shared.lock().seen.iter().filter(|seen| seen.operation == operation).count()
    }

    /// How many requests a fault has met.
    pub fn faulted(&self) -> usize {
        self.shared.lock().seen.iter().filter(|seen| seen.is_faulted).count()
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// The variables of one pair of keys, with nothing else to be found on the machine.
pub fn environment(access_key: &str, secret_key: &str) -> Vec<(&'static str, String)> {
    vec![
        ("AWS_ACCESS_KEY_ID", access_key.to_owned()),
        ("AWS_SECRET_ACCESS_KEY", secret_key.to_owned()),
        ("AWS_REGION", REGION.to_owned()),
        ("AWS_EC2_METADATA_DISABLED", "true".to_owned()),
        ("AWS_CONFIG_FILE", "/dev/null".to_owned()),
        ("AWS_SHARED_CREDENTIALS_FILE", "/dev/null".to_owned()),
    ]
}

fn bound(port: u16) -> Option<Socket> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).ok()?;
    socket.set_reuse_address(true).ok()?;
    socket.set_nonblocking(true).ok()?;
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)).into()).ok()?;
    Some(socket)
}

async fn accept(listener: TcpListener, shared: Arc<Shared>, stop: CancellationToken) {
    while let Ok((stream, _)) = listener.accept().await {
        let _ = stream.set_nodelay(true);
        let (shared, stop) = (shared.clone(), stop.clone());
        tokio::spawn(async move {
            let served = async {
                match shared.tls.clone() {
                    None => serve(Wire::new(stream), &shared, &stop).await,
                    Some(tls) => {
                        if let Ok(stream) = tls.accept(stream).await {
                            serve(Wire::new(stream), &shared, &stop).await;
                        }
                    }
                }
            };
            stop.run_until_cancelled(served).await
        });
    }
}

/// One connection, request by request.
async fn serve<S: AsyncRead + AsyncWrite + Unpin>(mut wire: Wire<S>, shared: &Arc<Shared>, stop: &CancellationToken) {
    while let Ok(Some(head)) = wire.read_head().await {
        if stop.is_cancelled() {
            return;
        }
        let (path, query) = head.target.split_once('?').unwrap_or((&head.target, ""));
        let path = percent_encoding::percent_decode_str(path.trim_start_matches('/')).decode_utf8_lossy().into_owned();
        let key = path.split_once('/').map_or("", |(_, key)| key);
        let operation = Operation::of(&head.method, !key.is_empty(), query);
        let fault = {
            let mut state = shared.lock();
            let rule = state.rules.iter_mut().find_map(|(_, rule)| rule.meets(operation, key).then_some(rule));
            rule.map(|rule| rule.fault.clone())
        };
        let mut seen = Seen {
            operation,
            key: key.to_owned(),
            status: 0,
            body_bytes: 0,
            if_none_match: head.header("if-none-match").map(str::to_owned),
            is_faulted: fault.is_some(),
        };
        if let Some(Fault::StallReading { after }) = fault {
            shared.lock().seen.push(seen);
            if wire.read_start_of_body(&head, after).await.is_ok() {
                std::future::pending::<()>().await;
            }
            return;
        }
        let Ok(body) = wire.read_body(&head).await else { return };
        seen.body_bytes = body.len();
        let honest = match fault.as_ref().is_none_or(Fault::has_effect) {
            true => Some(answer(&head, body, shared).await),
            false => None,
        };
        let mut said = match (&fault, &honest) {
            (Some(Fault::Answer(answer) | Fault::EffectThenAnswer(answer)), _) => Some(answer.clone()),
            (_, honest) => honest.clone(),
        };
        if let Some(said) = &mut said {
            said.is_to_head = head.method == "HEAD";
            let date =
                (Timestamp::now() + shared.lock().clock_offset).strftime("%a, %d %b %Y %H:%M:%S GMT").to_string();
            said.headers.push(("date".into(), date));
            let is_silent = matches!(fault, Some(Fault::CloseAfter | Fault::HangAfter));
            seen.status = if is_silent { 0 } else { said.status };
        }
        shared.lock().seen.push(seen);
        if !send(&mut wire, fault, said).await {
            return;
        }
    }
}

/// Whether the connection can go on.
async fn send<S: AsyncRead + AsyncWrite + Unpin>(
    wire: &mut Wire<S>,
    fault: Option<Fault>,
    said: Option<Answer>,
) -> bool {
    match &fault {
        Some(Fault::Hang | Fault::HangAfter) => {
            wire.wait_for_end().await;
            return false;
        }
        Some(Fault::CloseBefore | Fault::CloseAfter) => return false,
        Some(Fault::Garbage(bytes)) => {
            let _ = wire.write(bytes).await;
            return false;
        }
        Some(Fault::Delay(delay)) => tokio::time::sleep(*delay).await,
        _ => {}
    }
    let mut said = said.expect("every other fault says something");
    if said.is_to_head {
        return wire.write(&said.head()).await.is_ok();
    }
    match fault {
        Some(Fault::TruncatedBody { missing }) => {
            said.body.truncate(said.body.len().saturating_sub(missing));
            said.headers.retain(|(name, _)| name != "content-length");
        }
        Some(Fault::WrongContent) => {
            let mut wrong = said.body.to_vec();
            let middle = wrong.len() / 2;
            if let Some(byte) = wrong.get_mut(middle) {
                *byte ^= 1;
            }
            said.body = Bytes::from(wrong);
        }
        _ => {}
    }
    if wire.write(&said.head()).await.is_err() {
        return false;
    }
    match fault {
        Some(Fault::StallBody { after }) => {
            let _ = wire.write(&said.body[..after.min(said.body.len())]).await;
            wire.wait_for_end().await;
            false
        }
        Some(Fault::ShortBody { missing }) => {
            let _ = wire.write(&said.body[..said.body.len().saturating_sub(missing)]).await;
            false
        }
        Some(Fault::Trickle { bytes, pause }) => {
            for piece in said.body.chunks(bytes.max(1)) {
                if wire.write(piece).await.is_err() {
                    return false;
                }
                tokio::time::sleep(pause).await;
            }
            true
        }
        _ => wire.write(&said.body).await.is_ok(),
    }
}

/// What an honest store answers.
async fn answer(head: &Head, body: Bytes, shared: &Arc<Shared>) -> Answer {
    if let Some(refused) = refusal(head, &shared.lock()) {
        return refused;
    }
    let mut request = HttpRequest::new(Body::from(body));
    *request.method_mut() = head.method.parse().expect("a method is a word");
    let Ok(uri) = head.target.parse() else { return s3_answer(400, "InvalidURI", "") };
    *request.uri_mut() = uri;
    for (name, value) in &head.headers {
        if let (Ok(name), Ok(value)) =
            (axum::http::HeaderName::try_from(name), axum::http::HeaderValue::try_from(value))
        {
            request.headers_mut().append(name, value);
        }
    }
    let Ok(response) = shared.service.call(request).await else { return s3_answer(500, "InternalError", "") };
    let (parts, mut stream) = response.into_parts();
    let mut body = Vec::new();
    while let Some(Ok(chunk)) = stream.next().await {
        body.push(chunk);
    }
    let body = if body.len() == 1 { body.remove(0) } else { Bytes::from(body.concat()) };
    let header = |(name, value): (&axum::http::HeaderName, &axum::http::HeaderValue)| {
        (name.as_str().to_owned(), String::from_utf8_lossy(value.as_bytes()).into_owned())
    };
    let headers = parts.headers.iter().map(header).collect();
    Answer { status: parts.status.as_u16(), headers, body, is_to_head: false }
}

/// What S3 refuses before it looks at the request: a time or a region that is not its own.
fn refusal(head: &Head, state: &State) -> Option<Answer> {
    let now = Timestamp::now() + state.clock_offset;
    if let Some(date) = head.header("x-amz-date") {
        let signed = jiff::civil::DateTime::strptime("%Y%m%dT%H%M%SZ", date).ok()?;
        let signed = signed.to_zoned(jiff::tz::TimeZone::UTC).ok()?.timestamp();
        if signed.duration_since(now).abs() > SKEW_MAX {
            let elements = format!("<ServerTime>{}</ServerTime>", now.strftime("%Y-%m-%dT%H:%M:%SZ"));
            return Some(s3_answer(403, "RequestTimeTooSkewed", &elements));
        }
    }
    let region = state.region.as_ref()?;
    // Credential=KEY/20260101/REGION/s3/aws4_request
    let scope = head.header("authorization")?.split("Credential=").nth(1)?;
    let signed = scope.split('/').nth(2)?;
    if signed == region {
        return None;
    }
    let message =
        format!("The authorization header is malformed; the region '{signed}' is wrong; expecting '{region}'");
    Some(s3_answer_saying(400, "AuthorizationHeaderMalformed", &message, &format!("<Region>{region}</Region>")))
}
