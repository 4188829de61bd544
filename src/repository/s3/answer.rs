//! Owns: what an S3 store's refusal means: the kind of error, its cause in words, what to do about it.
//! Does not own: how the answer came (`request.rs`), what is done next (`put.rs`, `multipart.rs`, the caller). Pure.
//!
//! The codes are those of the S3 API reference, "Error responses", and what MinIO, Ceph, Garage and R2 answer beside.

use crate::repository::StoreErrorKind;

/// What was asked of the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Put,
    Head,
    Get,
    List,
    Delete,
    CreateUpload,
    UploadPart,
    CompleteUpload,
    AbortUpload,
    ListUploads,
}

impl Action {
    /// For the sentence "could not … s3://…".
    pub(super) fn verb(self) -> &'static str {
        match self {
            Action::Put | Action::CreateUpload | Action::UploadPart | Action::CompleteUpload => "store",
            Action::Head | Action::Get => "read",
            Action::List | Action::ListUploads => "list",
            Action::Delete | Action::AbortUpload => "delete",
        }
    }

    /// The permission it needs, as policies name it.
    pub(super) fn permission(self) -> &'static str {
        match self {
            Action::Put | Action::CreateUpload | Action::UploadPart | Action::CompleteUpload => "s3:PutObject",
            Action::Head | Action::Get => "s3:GetObject",
            Action::List => "s3:ListBucket",
            Action::Delete => "s3:DeleteObject",
            Action::AbortUpload => "s3:AbortMultipartUpload",
            Action::ListUploads => "s3:ListBucketMultipartUploads",
        }
    }

    fn denied_hint(self) -> &'static str {
        match self {
            Action::Put | Action::CreateUpload | Action::UploadPart | Action::CompleteUpload => {
                "allow s3:PutObject on the prefix's objects (arn:aws:s3:::BUCKET/PREFIX/*), and kms:GenerateDataKey where sse is aws:kms; archiving goes on by itself then"
            }
            Action::Head | Action::Get => {
                "allow s3:GetObject on the prefix's objects (arn:aws:s3:::BUCKET/PREFIX/*) and s3:ListBucket on the bucket: without the second, S3 says \"denied\" for what is not there"
            }
            Action::List => "allow s3:ListBucket on the bucket (arn:aws:s3:::BUCKET), for the prefix",
            Action::Delete => {
                "a writer needs no right to delete, what it made superfluous just stays; otherwise allow s3:DeleteObject, and see whether Object Lock or a legal hold keeps the object"
            }
            Action::AbortUpload => {
                "allow s3:AbortMultipartUpload, or let a lifecycle rule of the bucket abort unfinished uploads"
            }
            Action::ListUploads => {
                "allow s3:ListBucketMultipartUploads, or let a lifecycle rule of the bucket abort unfinished uploads"
            }
        }
    }
}

/// A store's answer that is no success.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Answer<'a> {
    pub status: u16,
    /// The `Code` of an S3 error document; `None` when the body was none (`HEAD` has no body).
    pub code: Option<&'a str>,
    pub message: Option<&'a str>,
    pub request_id: Option<&'a str>,
    /// `x-amz-bucket-region`, or where else the store says the bucket is.
    pub region: Option<&'a str>,
    /// The target of a redirect.
    pub location: Option<&'a str>,
    /// The beginning of a body that is no S3 error document.
    pub body: Option<&'a str>,
}

/// What matters to the code that asked, beyond the kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reply {
    /// The condition did not hold: the name is taken.
    Exists,
    /// Another write to the same name is under way.
    Conflict,
    /// The multipart upload is not there (any more), or not in a state to be completed.
    UploadGone,
    /// The store does not know this header or operation.
    NotImplemented,
    /// Success, it says, in a document nobody knows.
    Unclear,
    Other,
}

/// Why a request did not succeed.
#[derive(Clone, Debug)]
pub(super) struct Refusal {
    pub kind: StoreErrorKind,
    pub reply: Reply,
    pub cause: String,
    pub hint: Option<&'static str>,
    /// A client built anew from its sources (credentials, certificates) may succeed.
    pub renewable: bool,
}

impl Refusal {
    pub(super) fn new(kind: StoreErrorKind, cause: impl Into<String>) -> Refusal {
        Refusal { kind, reply: Reply::Other, cause: cause.into(), hint: None, renewable: false }
    }

    pub(super) fn hinted(mut self, hint: &'static str) -> Refusal {
        self.hint = Some(hint);
        self
    }

    fn replying(mut self, reply: Reply) -> Refusal {
        self.reply = reply;
        self
    }

    fn renewable(mut self) -> Refusal {
        self.renewable = true;
        self
    }
}

const NO_BUCKET: &str = "is the bucket's name right, and does it exist in this account and region? seawall never creates one; it goes on by itself when the bucket is back";
const KEYS: &str = "are the access key and secret right and active? Sources: environment, profile, web identity, container, instance; they are read again by themselves";
const EXPIRED: &str = "the credentials have expired or were rotated: renew them at their source; they are read again by themselves, nothing is lost meanwhile";
const SIGNATURE: &str = "the secret key does not fit the access key, or something between here and the store changes requests (a proxy?); keys are read again by themselves";
const CLOCK: &str = "this machine's clock is wrong: run an NTP client (small differences are corrected by themselves)";
const REGION: &str = "set `region` of the repository to the bucket's region";
const REDIRECT: &str = "set `endpoint`, `region` and `path_style` so that requests reach the bucket without a redirect: a signed request cannot follow one";
const NOT_S3: &str =
    "does `endpoint` name an S3 store (scheme, host, port), and not a console, a proxy or a web server?";
const TRANSIENT: &str = "the store has trouble of its own; the agent retries by itself, WAL stays on the server";
const SLOW_DOWN: &str = "the store asks for fewer requests; the agent slows down and retries by itself";
const READ_ONLY: &str = "the store takes no writes there: is it read-only, a replica, under maintenance, or does `endpoint` name something else?";
const QUOTA: &str = "raise the quota or make room in the store; the agent goes on by itself as soon as there is room";
const KMS: &str = "may these credentials use the KMS key (kms:GenerateDataKey, kms:Decrypt), and is it enabled, in the bucket's region, and rightly named in `sse`?";
const STORAGE_CLASS: &str = "does the store know this `storage_class`? Leave it out for the bucket's default";
const ARGUMENT: &str = "the store does not know something it was sent: `checksum = \"none\"`, `sse`, `storage_class` and `path_style` are what stores differ in";
const COLD: &str = "a lifecycle rule has moved the object to cold storage: restore it there first, and exclude the repository from that rule";
const DAMAGED_ON_THE_WAY: &str =
    "what arrived was not what was sent; it is sent again. If this repeats, suspect memory or network of this machine";

pub(super) fn refusal(action: Action, answer: &Answer<'_>) -> Refusal {
    let cause = cause(action, answer);
    match answer.code {
        Some(code) => by_code(action, code, answer, &cause).unwrap_or_else(|| by_status(action, answer, cause)),
        None => by_status(action, answer, cause),
    }
}

fn by_code(action: Action, code: &str, answer: &Answer<'_>, cause: &str) -> Option<Refusal> {
    use StoreErrorKind::*;
    let new = |kind, hint| Refusal::new(kind, cause).hinted(hint);
    let plain = |kind| Refusal::new(kind, cause);
    let message = answer.message.unwrap_or_default();
    Some(match code {
        "NoSuchBucket" | "NoSuchBucketPolicy" => new(RootMissing, NO_BUCKET),
        "NoSuchKey" | "NoSuchVersion" | "NotFound" if answer.status == 404 => plain(NotFound),
        "NoSuchUpload" => plain(NotFound).replying(Reply::UploadGone),
        "InvalidPart" | "InvalidPartOrder" | "EntityTooSmall" if action == Action::CompleteUpload => {
            plain(NotFound).replying(Reply::UploadGone)
        }
        "PreconditionFailed" => plain(AlreadyExists).replying(Reply::Exists),
        "ConditionalRequestConflict" => new(Unavailable, TRANSIENT).replying(Reply::Conflict),
        "ExpiredToken" | "ExpiredTokenException" | "TokenRefreshRequired" | "RequestExpired" => {
            new(Credentials, EXPIRED).renewable()
        }
        "InvalidAccessKeyId" | "InvalidToken" | "InvalidClientTokenId" | "InvalidSecurity" | "NotSignedUp" => {
            new(Credentials, KEYS).renewable()
        }
        "SignatureDoesNotMatch" => new(Credentials, SIGNATURE).renewable(),
        "RequestTimeTooSkewed" => new(Credentials, CLOCK),
        "AuthorizationHeaderMalformed" if message.contains("region") || message.contains("credential scope") => {
            new(Misconfigured, REGION)
        }
        "AuthorizationHeaderMalformed" => new(Credentials, SIGNATURE).renewable(),
        "IllegalLocationConstraintException" => new(Misconfigured, REGION),
        "PermanentRedirect" | "TemporaryRedirect" | "Redirect" => redirect(answer, cause),
        "InvalidObjectState" => new(Misconfigured, COLD),
        "MethodNotAllowed" | "XMinioServerNotInitialized" if answer.status == 405 => new(ReadOnly, READ_ONLY),
        "ReadOnly" | "AllAccessDisabled" => new(ReadOnly, READ_ONLY),
        "QuotaExceeded"
        | "QuotaExceededException"
        | "XMinioStorageFull"
        | "StorageFull"
        | "InsufficientStorage"
        | "XMinioAdminBucketQuotaExceeded"
        | "ServiceQuotaExceededException"
        | "BucketQuotaExceeded" => new(NoSpace, QUOTA),
        "InvalidStorageClass" => new(Misconfigured, STORAGE_CLASS),
        _ if code.starts_with("KMS") || code.contains("KMSKey") => new(PermissionDenied, KMS),
        "AccessDenied" | "AccessDeniedException" | "Forbidden" | "AccountProblem" if message.contains("kms:") => {
            new(PermissionDenied, KMS)
        }
        // Garage's words for it.
        "AccessDenied" if message.contains("nvalid signature") => new(Credentials, SIGNATURE).renewable(),
        "AccessDenied" if message.contains("No such key") => new(Credentials, KEYS).renewable(),
        "AccessDenied" if message.contains("Request has expired") => new(Credentials, EXPIRED).renewable(),
        "AccessDenied" | "AccessDeniedException" | "Forbidden" | "AccountProblem" => {
            new(PermissionDenied, action.denied_hint()).renewable()
        }
        "SlowDown"
        | "Throttling"
        | "ThrottlingException"
        | "TooManyRequests"
        | "TooManyRequestsException"
        | "RequestLimitExceeded"
        | "BandwidthLimitExceeded"
        | "SlowDownRead"
        | "SlowDownWrite" => new(Unavailable, SLOW_DOWN),
        "BadDigest"
        | "InvalidDigest"
        | "XAmzContentSHA256Mismatch"
        | "XAmzContentChecksumMismatch"
        | "IncompleteBody" => new(Unavailable, DAMAGED_ON_THE_WAY),
        "InvalidRange" => plain(Corrupt),
        "NotImplemented" => new(Misconfigured, ARGUMENT).replying(Reply::NotImplemented),
        "InvalidArgument"
        | "InvalidRequest"
        | "MalformedXML"
        | "InvalidBucketName"
        | "InvalidStorageClassForSSE"
        | "InvalidEncryptionAlgorithmError"
        | "MissingContentLength"
        | "UnsupportedOperation" => new(Misconfigured, ARGUMENT),
        _ => return None,
    })
}

/// For codes nobody has heard of, and answers without one.
fn by_status(action: Action, answer: &Answer<'_>, cause: String) -> Refusal {
    use StoreErrorKind::*;
    let new = |kind, hint| Refusal::new(kind, cause.clone()).hinted(hint);
    let says_nothing = answer.code.is_none();
    match answer.status {
        // Old MinIO says "not modified" to `If-None-Match` on a write.
        304 | 412 => Refusal::new(AlreadyExists, cause).replying(Reply::Exists),
        300..=399 => redirect(answer, &cause),
        400 if says_nothing && action != Action::Head => new(Misconfigured, NOT_S3),
        401 => new(Credentials, KEYS).renewable(),
        403 if says_nothing && action != Action::Head => new(PermissionDenied, NOT_S3).renewable(),
        403 => new(PermissionDenied, action.denied_hint()).renewable(),
        404 if action == Action::Head => Refusal::new(NotFound, cause),
        404 => new(Misconfigured, NOT_S3),
        405 => new(ReadOnly, READ_ONLY),
        409 => new(Unavailable, TRANSIENT).replying(Reply::Conflict),
        416 => Refusal::new(Corrupt, cause),
        429 | 503 => new(Unavailable, SLOW_DOWN),
        501 => new(Misconfigured, ARGUMENT).replying(Reply::NotImplemented),
        507 => new(NoSpace, QUOTA),
        408 | 500..=599 => new(Unavailable, TRANSIENT),
        // An error document inside a success: S3 reports failures of long requests like that.
        200..=299 if !says_nothing => new(Unavailable, TRANSIENT),
        200..=299 => new(Misconfigured, NOT_S3).replying(Reply::Unclear),
        _ => new(Misconfigured, ARGUMENT),
    }
}

fn redirect(answer: &Answer<'_>, cause: &str) -> Refusal {
    // Soon after a bucket was created its name leads elsewhere for a while.
    let kind = match answer.code {
        Some("TemporaryRedirect") => StoreErrorKind::Unavailable,
        _ => StoreErrorKind::Misconfigured,
    };
    Refusal::new(kind, cause).hinted(if answer.region.is_some() { REGION } else { REDIRECT })
}

/// `s3:PutObject: AccessDenied (HTTP 403): Access Denied; request 4442587FB7D0A2F9`
fn cause(action: Action, answer: &Answer<'_>) -> String {
    let mut cause = format!("{}: ", action.permission());
    match answer.code {
        Some(code) => cause += &format!("{} (HTTP {})", printable(code, 80), answer.status),
        None => cause += &format!("HTTP {}", answer.status),
    }
    if let Some(message) = answer.message.filter(|message| !message.is_empty()) {
        cause += &format!(": {}", printable(message, 300));
    }
    if let Some(body) = answer.body.filter(|_| answer.code.is_none()).filter(|body| !body.trim().is_empty()) {
        cause += &format!(", with no S3 document but {:?}", printable(body.trim(), 80));
    }
    if let Some(region) = answer.region.filter(|_| (300..=400).contains(&answer.status)) {
        cause += &format!("; the bucket is in region {}", printable(region, 40));
    }
    if let Some(location) = answer.location {
        cause += &format!("; redirected to {}", printable(location, 120));
    }
    if let Some(id) = answer.request_id {
        cause += &format!("; request {}", printable(id, 80));
    }
    cause
}

/// What came from the network, fit for a log line.
fn printable(text: &str, characters_max: usize) -> String {
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    let mut short: String = text.chars().map(plain).take(characters_max).collect();
    if text.chars().nth(characters_max).is_some() {
        short.push('…');
    }
    short
}

/// A failure without an answer: what the errors' chain tells, in one text.
pub(super) fn no_answer(chain: &str, timed_out: bool) -> Refusal {
    use StoreErrorKind::*;
    let has = |words: &[&str]| words.iter().any(|word| chain.contains(word));
    let new = |kind, hint| Refusal::new(kind, printable(chain, 600)).hinted(hint);
    if has(&["invalid peer certificate", "certificate not valid", "UnknownIssuer", "UnknownCA"]) {
        return new(
            Misconfigured,
            "the endpoint's certificate is not trusted: is `ca_file` the authority that signed it, and `endpoint` the name in it? Something on the way may also be intercepting TLS",
        )
        .renewable();
    }
    if has(&["InvalidContentType", "corrupt message", "TLS handshake", "received fatal alert", "HandshakeFailure"]) {
        return new(Misconfigured, "does the endpoint speak TLS (https) on this port, or plain http?").renewable();
    }
    if has(&["invalid HTTP", "invalid Header", "message head is too large"]) {
        return new(Misconfigured, NOT_S3);
    }
    if has(&["dns error", "failed to lookup", "Name or service not known", "DNS"]) {
        return new(
            Unavailable,
            "the store's name is not found: is `endpoint` or `region` right, and does DNS work? With bucket names in host names (`path_style = false`) each bucket needs one",
        );
    }
    if has(&["onnection refused"]) {
        return new(
            Unavailable,
            "nothing listens there: is the store running, and are host and port of `endpoint` right?",
        );
    }
    if timed_out || has(&["timed out", "timeout", "minimum throughput"]) {
        return new(
            Unavailable,
            "no answer in time: the store is overloaded, or the network (a firewall?) swallows packets; the agent retries by itself",
        );
    }
    new(Unavailable, TRANSIENT)
}

/// No request was made, because there are no credentials to sign it with.
pub(super) fn no_credentials(chain: &str) -> Refusal {
    Refusal::new(StoreErrorKind::Credentials, format!("no usable credentials: {}", printable(chain, 600)))
        .hinted("give credentials in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY), a profile, a web identity, or by the container's or instance's role")
        .renewable()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(action: Action, status: u16, code: Option<&str>, message: Option<&str>) -> Refusal {
        refusal(action, &Answer { status, code, message, ..Answer::default() })
    }

    #[test]
    fn codes_mean_what_the_reference_says() {
        use StoreErrorKind::*;
        let table = [
            (Action::Put, 404, "NoSuchBucket", RootMissing),
            (Action::Get, 404, "NoSuchKey", NotFound),
            (Action::Put, 403, "AccessDenied", PermissionDenied),
            (Action::Put, 403, "InvalidAccessKeyId", Credentials),
            (Action::Put, 400, "ExpiredToken", Credentials),
            (Action::Put, 403, "SignatureDoesNotMatch", Credentials),
            (Action::Put, 403, "RequestTimeTooSkewed", Credentials),
            (Action::Put, 301, "PermanentRedirect", Misconfigured),
            (Action::Put, 307, "TemporaryRedirect", Unavailable),
            (Action::Put, 503, "SlowDown", Unavailable),
            (Action::Put, 500, "InternalError", Unavailable),
            (Action::CompleteUpload, 200, "InternalError", Unavailable),
            (Action::Put, 405, "MethodNotAllowed", ReadOnly),
            (Action::Put, 507, "XMinioStorageFull", NoSpace),
            (Action::Put, 403, "QuotaExceeded", NoSpace),
            (Action::Put, 400, "KMS.DisabledException", PermissionDenied),
            (Action::Put, 400, "InvalidStorageClass", Misconfigured),
            (Action::Put, 400, "InvalidArgument", Misconfigured),
            (Action::Put, 400, "BadDigest", Unavailable),
            (Action::Put, 412, "PreconditionFailed", AlreadyExists),
            (Action::Put, 409, "ConditionalRequestConflict", Unavailable),
            (Action::Put, 409, "OperationAborted", Unavailable),
            (Action::Get, 416, "InvalidRange", Corrupt),
            (Action::Get, 403, "InvalidObjectState", Misconfigured),
            (Action::Put, 501, "NotImplemented", Misconfigured),
            (Action::Put, 418, "NobodyHasHeardOfIt", Misconfigured),
            (Action::Put, 503, "NobodyHasHeardOfIt", Unavailable),
        ];
        for (action, status, code, kind) in table {
            assert_eq!(answered(action, status, Some(code), None).kind, kind, "{status} {code}");
        }
    }

    /// A web server says 404 to everything: nothing is concluded about objects from that.
    #[test]
    fn absence_is_only_believed_in_an_s3_document() {
        assert_eq!(answered(Action::Get, 404, None, None).kind, StoreErrorKind::Misconfigured);
        assert_eq!(answered(Action::Put, 404, None, None).kind, StoreErrorKind::Misconfigured);
        assert_eq!(answered(Action::List, 200, None, None).kind, StoreErrorKind::Misconfigured);
        let html = Answer { status: 404, body: Some("<html>\r\nnot here"), ..Answer::default() };
        let refused = refusal(Action::Get, &html);
        assert!(refused.cause.contains("<html>  not here"), "{}", refused.cause);
        assert!(refused.hint.unwrap().contains("endpoint"));
    }

    #[test]
    fn a_conflict_is_never_taken_for_an_object() {
        let conflict = answered(Action::Put, 409, Some("ConditionalRequestConflict"), None);
        assert_eq!((conflict.kind, conflict.reply), (StoreErrorKind::Unavailable, Reply::Conflict));
        assert_eq!(answered(Action::Put, 412, None, None).reply, Reply::Exists);
        assert_eq!(answered(Action::Put, 304, None, None).reply, Reply::Exists);
    }

    #[test]
    fn refusals_name_the_permission_and_cure() {
        let denied = answered(Action::List, 403, Some("AccessDenied"), Some("Access Denied"));
        assert_eq!(denied.cause, "s3:ListBucket: AccessDenied (HTTP 403): Access Denied");
        assert!(denied.hint.unwrap().contains("s3:ListBucket"));
        let kms =
            answered(Action::Put, 403, Some("AccessDenied"), Some("not authorized to perform: kms:GenerateDataKey"));
        assert!(kms.hint.unwrap().contains("KMS"));
        let moved =
            Answer { status: 301, code: Some("PermanentRedirect"), region: Some("eu-west-1"), ..Answer::default() };
        let moved = refusal(Action::Put, &moved);
        assert!(moved.cause.contains("eu-west-1") && moved.hint.unwrap().contains("region"), "{moved:?}");
    }

    #[test]
    fn a_failed_connection_is_told_apart() {
        use StoreErrorKind::*;
        let table = [
            ("client error (Connect): tcp connect error: Connection refused (os error 111)", Unavailable, "running"),
            ("client error (Connect): dns error: failed to lookup address information", Unavailable, "DNS"),
            ("invalid peer certificate: UnknownIssuer", Misconfigured, "ca_file"),
            ("received corrupt message of type InvalidContentType", Misconfigured, "https"),
            ("invalid HTTP version parsed", Misconfigured, "S3"),
            ("HTTP connect timeout occurred after 5s", Unavailable, "no answer"),
            ("connection closed before message completed", Unavailable, "retries"),
        ];
        for (chain, kind, word) in table {
            let refused = no_answer(chain, false);
            assert_eq!(refused.kind, kind, "{chain}");
            assert!(refused.hint.unwrap().contains(word), "{chain}");
        }
    }

    #[test]
    fn what_the_network_says_is_fit_to_print() {
        let long = "x".repeat(5000) + "\n\u{1b}[31m";
        let refused = answered(Action::Put, 500, Some("InternalError"), Some(&long));
        assert!(refused.cause.len() < 400);
        assert!(!printable("a\n\u{1b}b", 9).contains(['\n', '\u{1b}']));
    }
}
