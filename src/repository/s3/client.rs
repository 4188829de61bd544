//! Owns: the connection to an S3 store: the SDK's client, made of its sources and made anew when they changed;
//! connections shared by everything in the process; patience: attempts, delays and deadlines.
//! Does not own: requests (`request.rs`), what an answer means (`answer.rs`).

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use aws_config::meta::region::RegionProviderChain;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::config::interceptors::BeforeDeserializationInterceptorContextRef;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    AppName, BehaviorVersion, ConfigBag, Intercept, Region, RequestChecksumCalculation, ResponseChecksumValidation,
    RuntimeComponents, SharedHttpClient, StalledStreamProtectionConfig,
};
use aws_sdk_s3::error::BoxError;
use aws_sdk_s3::operation::complete_multipart_upload::CompleteMultipartUploadError;
use aws_sdk_s3::primitives::{DateTime, DateTimeFormat};
use aws_smithy_http_client::proxy::ProxyConfig;
use aws_smithy_http_client::tls::{Provider, TlsContext, TrustStore, rustls_provider::CryptoMode};
use aws_smithy_runtime_api::client::http::{HttpConnectorSettings, SharedHttpConnector, http_client_fn};
use aws_smithy_runtime_api::client::interceptors::context::InterceptorContext;
use aws_smithy_runtime_api::client::interceptors::dyn_dispatch_hint;
use aws_smithy_runtime_api::client::orchestrator::OrchestratorError;
use aws_smithy_runtime_api::client::retries::classifiers::{ClassifyRetry, RetryAction, RetryClassifierPriority};
use aws_smithy_types::retry::ErrorKind;
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tokio::time::Instant;

use super::S3Options;
use super::answer::Refusal;
use super::probe::Capabilities;
use crate::repository::StoreErrorKind;

/// TCP and TLS together. A store that is reachable at all answers within a few round trips.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// For an attempt that moves little, from its first byte to the answer's head. Larger: an unresponsive store is noticed
/// later. Smaller: one that is merely busy is asked again, and gets busier.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(15);
/// The slowest that still counts as progress; deadlines grow by what is moved.
const SLOWEST_BYTES_PER_SECOND: u64 = 512 << 10;
/// Within one call; the caller repeats beyond that, with longer pauses.
const ATTEMPTS: u32 = 3;
const FIRST_DELAY: Duration = Duration::from_millis(100);
const DELAY_MAX: Duration = Duration::from_secs(5);
/// A body that does not move for this long is given up.
pub(super) const STALL: Duration = Duration::from_secs(20);
/// Credentials and certificates are read again at most this often: whoever is refused asks often.
const RENEW_INTERVAL: Duration = Duration::from_secs(5);
/// Reading configuration may ask an instance's metadata service for the region.
const CONFIGURE_TIMEOUT: Duration = Duration::from_secs(20);
/// Kept open beyond use, per store. A connection costs some 50 KiB; one more than are used at once helps nobody.
const IDLE_CONNECTIONS_MAX: usize = 16;
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// Different authorities' files in one process.
const HTTP_CLIENTS_MAX: usize = 16;

/// One store as this process sees it: all that use the same options share it.
#[derive(Debug)]
pub(super) struct Shared {
    pub options: S3Options,
    pub capabilities: Capabilities,
    current: Mutex<Option<Connection>>,
    /// When a client was last built; held while one is.
    building: tokio::sync::Mutex<Option<Instant>>,
    clock: ClockDifference,
    /// It has refused to delete several objects in one request.
    pub lacks_batches: AtomicBool,
}

/// A client and which one it is.
#[derive(Clone, Debug)]
pub(super) struct Connection {
    pub client: Client,
    generation: u64,
}

impl Shared {
    pub(super) fn of(options: S3Options) -> Arc<Shared> {
        static OPEN: Mutex<Vec<Weak<Shared>>> = Mutex::new(Vec::new());
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|shared| shared.strong_count() > 0);
        if let Some(known) = open.iter().filter_map(Weak::upgrade).find(|known| known.options == options) {
            return known;
        }
        let shared = Arc::new(Shared {
            options,
            capabilities: Capabilities::default(),
            current: Mutex::default(),
            building: tokio::sync::Mutex::default(),
            clock: ClockDifference::default(),
            lacks_batches: AtomicBool::new(false),
        });
        open.push(Arc::downgrade(&shared));
        shared
    }

    fn current(&self) -> std::sync::MutexGuard<'_, Option<Connection>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) async fn connection(&self) -> Result<Connection, Refusal> {
        if let Some(connection) = self.current().clone() {
            return Ok(connection);
        }
        let mut built = self.building.lock().await;
        if let Some(connection) = self.current().clone() {
            return Ok(connection);
        }
        *built = Some(Instant::now());
        let connection = self.build(1).await?;
        if let Some(endpoint) = self.options.endpoint.as_deref().filter(|endpoint| super::is_open_wire(endpoint)) {
            tracing::warn!(endpoint, "the store is reached without encryption: use an https endpoint");
        }
        Ok(connection)
    }

    /// A newer client than `refused`, where one can be had now: the sources of credentials and certificates are read
    /// again. Those refused at the same time share what the first of them gets.
    pub(super) async fn renewed(&self, refused: &Connection) -> Option<Connection> {
        let mut built = self.building.lock().await;
        if let Some(newer) = self.current().clone().filter(|current| current.generation > refused.generation) {
            return Some(newer);
        }
        if built.is_some_and(|at| at.elapsed() < RENEW_INTERVAL) {
            return None;
        }
        *built = Some(Instant::now());
        tracing::debug!("reading credentials and certificates again");
        self.build(refused.generation + 1).await.ok()
    }

    async fn build(&self, generation: u64) -> Result<Connection, Refusal> {
        let building = build(&self.options, self.clock.clone());
        let client = tokio::time::timeout(CONFIGURE_TIMEOUT, building).await.map_err(|_| {
            Refusal::new(StoreErrorKind::Unavailable, format!("no AWS configuration within {CONFIGURE_TIMEOUT:?}"))
                .hinted("does the instance's metadata service answer? `region` and credentials in the environment or a profile need none")
        })??;
        let connection = Connection { client, generation };
        *self.current() = Some(connection.clone());
        Ok(connection)
    }

    /// How far the store's clock is ahead of ours, in ms, as its last answer said; `None` before the first.
    pub(super) fn clock_difference_ms(&self) -> Option<i64> {
        Some(self.clock.0.load(Ordering::Relaxed)).filter(|&ms| ms != ClockDifference::UNKNOWN)
    }
}

/// Deadlines for a request that moves `bytes`.
pub(super) fn deadlines(bytes: u64) -> TimeoutConfig {
    let attempt = ATTEMPT_TIMEOUT + allowance(bytes);
    TimeoutConfig::builder()
        .connect_timeout(CONNECT_TIMEOUT)
        .operation_attempt_timeout(attempt)
        .operation_timeout((attempt + DELAY_MAX) * ATTEMPTS)
        .build()
}

/// What moving `bytes` may take on the slowest line that still counts as one.
pub(super) fn allowance(bytes: u64) -> Duration {
    Duration::from_secs(bytes / SLOWEST_BYTES_PER_SECOND)
}

async fn build(options: &S3Options, clock: ClockDifference) -> Result<Client, Refusal> {
    let http = http_client(options.ca_file.as_deref())?;
    let mut loader = aws_config::defaults(BehaviorVersion::latest())
        // Security token and metadata services are not the store: the system's authorities vouch for them.
        .http_client(http_client(None)?)
        .app_name(AppName::new("seawall").expect("it is a valid name"));
    if let Some(profile) = &options.profile {
        loader = loader.profile_name(profile);
    }
    loader = match (&options.region, &options.endpoint) {
        (Some(region), _) => loader.region(Region::new(region.clone())),
        // Stores other than AWS mostly take any region: no metadata service is asked for it.
        (None, Some(_)) => loader.region(
            RegionProviderChain::first_try(aws_config::environment::EnvironmentVariableRegionProvider::new())
                .or_else(profile_region(options))
                .or_else(Region::from_static("us-east-1")),
        ),
        (None, None) => loader,
    };
    let sdk = loader.load().await;
    if sdk.region().is_none() {
        return Err(Refusal::new(StoreErrorKind::Misconfigured, "no region is configured anywhere")
            .hinted("set `region` of the repository, or AWS_REGION"));
    }
    let elsewhere = options.endpoint.is_some()
        || sdk.endpoint_url().is_some()
        || std::env::var_os("AWS_ENDPOINT_URL_S3").is_some_and(|url| !url.is_empty());
    let mut config = aws_sdk_s3::config::Builder::from(&sdk)
        .http_client(http)
        .force_path_style(options.path_style.unwrap_or(elsewhere))
        .retry_config(
            RetryConfig::standard()
                .with_max_attempts(ATTEMPTS)
                .with_initial_backoff(FIRST_DELAY)
                .with_max_backoff(DELAY_MAX),
        )
        .timeout_config(deadlines(0))
        .stalled_stream_protection(StalledStreamProtectionConfig::enabled().grace_period(STALL).build())
        // We send a checksum of our own: computed once, in a header, not as a trailer that many stores reject.
        .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
        .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
        .retry_classifier(Patience)
        .interceptor(clock);
    if let Some(endpoint) = &options.endpoint {
        config = config.endpoint_url(endpoint);
    }
    Ok(Client::from_conf(config.build()))
}

fn profile_region(options: &S3Options) -> aws_config::profile::ProfileFileRegionProvider {
    let mut provider = aws_config::profile::ProfileFileRegionProvider::builder();
    if let Some(profile) = &options.profile {
        provider = provider.profile_name(profile);
    }
    provider.build()
}

/// The connections to every store whose certificates `ca_file` (`None`: the system's authorities) vouches for.
fn http_client(ca_file: Option<&Path>) -> Result<SharedHttpClient, Refusal> {
    static CLIENTS: Mutex<Vec<(Option<Vec<u8>>, SharedHttpClient)>> = Mutex::new(Vec::new());
    let pem = ca_file.map(read_authorities).transpose()?;
    let mut clients = CLIENTS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, known)) = clients.iter().find(|(known, _)| *known == pem) {
        return Ok(known.clone());
    }
    if clients.len() >= HTTP_CLIENTS_MAX {
        clients.remove(0);
    }
    let client = new_http_client(pem.clone());
    clients.push((pem, client.clone()));
    Ok(client)
}

fn new_http_client(pem: Option<Vec<u8>>) -> SharedHttpClient {
    let connector = OnceLock::new();
    // Whatever settings a service asks with: one pool for all.
    http_client_fn(move |_, components| {
        let connect = || {
            let trust = match &pem {
                Some(pem) => TrustStore::empty().with_pem_certificate(pem.clone()),
                None => TrustStore::default(),
            };
            let tls = TlsContext::builder().with_trust_store(trust).build().expect("building it does not fail");
            let mut builder = aws_smithy_http_client::Connector::builder()
                .pool_idle_timeout(IDLE_TIMEOUT)
                .pool_max_idle_per_host(IDLE_CONNECTIONS_MAX)
                .proxy_config(ProxyConfig::from_env())
                .connector_settings(HttpConnectorSettings::builder().connect_timeout(CONNECT_TIMEOUT).build())
                .tls_provider(Provider::Rustls(CryptoMode::AwsLc))
                .tls_context(tls);
            builder.set_sleep_impl(components.sleep_impl());
            SharedHttpConnector::new(builder.build())
        };
        connector.get_or_init(connect).clone()
    })
}

/// The file, if it holds nothing but good certificates: the SDK would take it without looking, and panic later.
fn read_authorities(path: &Path) -> Result<Vec<u8>, Refusal> {
    const HINT: &str =
        "`ca_file` must be a readable PEM file with the certificates of the authorities that may sign the endpoint's";
    let refused = |cause: String| {
        let refusal = Refusal::new(StoreErrorKind::Misconfigured, format!("ca_file {}: {cause}", path.display()));
        refusal.hinted(HINT)
    };
    let pem = std::fs::read(path).map_err(|error| refused(error.to_string()))?;
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let certificate = certificate.map_err(|error| refused(error.to_string()))?;
        roots.add(certificate).map_err(|error| refused(error.to_string()))?;
    }
    match roots.is_empty() {
        true => Err(refused("there is no certificate in it".to_string())),
        false => Ok(pem),
    }
}

/// What the SDK would not try again, or not late enough.
#[derive(Debug)]
struct Patience;

impl Patience {
    /// Longer waits are the caller's, who tells people about it.
    const RETRY_AFTER_MAX: Duration = Duration::from_secs(20);

    fn of(context: &InterceptorContext) -> Option<RetryAction> {
        let response = context.response()?;
        let failed = context.is_failed();
        let status = response.status().as_u16();
        let kind = match status {
            429 | 503 => ErrorKind::ThrottlingError,
            // Another write to the name is under way. For a completion the upload must begin anew.
            409 if !Self::completes_an_upload(context) => ErrorKind::TransientError,
            408 | 500 | 502 | 504 => ErrorKind::ServerError,
            _ => return None,
        };
        let retry_after = response.headers().get("retry-after").and_then(|seconds| seconds.parse().ok());
        Some(match retry_after.map(Duration::from_secs) {
            _ if !failed => return None,
            Some(after) => RetryAction::retryable_error_with_explicit_delay(kind, after.min(Self::RETRY_AFTER_MAX)),
            None => RetryAction::retryable_error(kind),
        })
    }

    fn completes_an_upload(context: &InterceptorContext) -> bool {
        let error = context.output_or_error().and_then(Result::err).and_then(OrchestratorError::as_operation_error);
        error.is_some_and(|error| error.downcast_ref::<CompleteMultipartUploadError>().is_some())
    }
}

impl ClassifyRetry for Patience {
    fn classify_retry(&self, context: &InterceptorContext) -> RetryAction {
        Self::of(context).unwrap_or(RetryAction::NoActionIndicated)
    }

    fn name(&self) -> &'static str {
        "Patience"
    }

    fn priority(&self) -> RetryClassifierPriority {
        RetryClassifierPriority::run_after(RetryClassifierPriority::transient_error_classifier())
    }
}

/// The store's clock minus ours in ms, from the `Date` of its answers.
#[derive(Clone, Debug)]
struct ClockDifference(Arc<AtomicI64>);

impl ClockDifference {
    const UNKNOWN: i64 = i64::MIN;

    fn of(response: &HttpResponse) -> Option<i64> {
        let date = DateTime::from_str(response.headers().get("date")?, DateTimeFormat::HttpDate).ok()?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).ok()?;
        date.to_millis().ok()?.checked_sub(i64::try_from(now.as_millis()).ok()?)
    }
}

impl Default for ClockDifference {
    fn default() -> ClockDifference {
        ClockDifference(Arc::new(AtomicI64::new(Self::UNKNOWN)))
    }
}

#[dyn_dispatch_hint]
impl Intercept for ClockDifference {
    fn name(&self) -> &'static str {
        "ClockDifference"
    }

    fn read_before_deserialization(
        &self,
        context: &BeforeDeserializationInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        if let Some(difference) = Self::of(context.response()) {
            self.0.store(difference, Ordering::Relaxed);
        }
        Ok(())
    }
}
