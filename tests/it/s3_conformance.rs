//! The S3 backend on real stores and on one that fails on command: what every store must do, and what only S3 does.
//!
//! Credentials come from the environment, which a process has one of: each test runs in a child of its own.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use bytes::Bytes;
use jiff::SignedDuration;
use seawall::error::{Advice, Disposition, ExitCode};
use seawall::repository::s3::{Checksum, S3Backend, S3Options, ServerSideEncryption, StorageClasses};
use seawall::repository::{Backend, Facts, Key, StoreError, StoreErrorKind};
use seawall::testkit::conformance;

use crate::support::rig::{PATIENCE, wait_for};
use crate::support::s3::{self, ACCESS_KEY, BUCKET, Fault, Operation, Rule, S3Server, SECRET_KEY, s3_answer};

/// Whether this is the child that does the test; otherwise starts it, with these variables more, and waits.
pub fn in_child(more: &[(&str, &str)]) -> bool {
    const MARK: &str = "SEAWALL_TEST_CHILD";
    if std::env::var_os(MARK).is_some() {
        return true;
    }
    let name = std::thread::current().name().expect("tests have names").to_owned();
    let mut child = Command::new(std::env::current_exe().expect("a test runs"));
    child.args(["--exact", &name, "--nocapture"]).env(MARK, "1").envs(s3::environment(ACCESS_KEY, SECRET_KEY));
    child.env("SEAWALL_TEST_STORES", std::env::var_os("SEAWALL_TEST_STORES").unwrap_or_default());
    let output = child.envs(more.iter().copied()).stdin(Stdio::null()).output().expect("it starts");
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    text.lines().filter(|line| line.starts_with("skipped")).for_each(|line| eprintln!("{line}"));
    false
}

pub fn options(store: &S3Server) -> S3Options {
    S3Options { bucket: BUCKET.into(), prefix: "p/q".into(), endpoint: Some(store.endpoint()), ..S3Options::default() }
}

fn key(name: &str) -> Key {
    Key::new(name)
}

fn pattern(bytes: usize) -> Bytes {
    let mut content = vec![0; bytes];
    fastrand::Rng::with_seed(7).fill(&mut content);
    content.into()
}

async fn put(backend: &S3Backend, name: &str, body: &Bytes) -> Result<(), StoreError> {
    backend.put_new(&key(name), std::slice::from_ref(body)).await
}

async fn upload(backend: &S3Backend, name: &str, body: &Bytes) -> Result<(), StoreError> {
    let mut upload = backend.begin_upload(&key(name)).await?;
    for piece in 0..body.len().div_ceil(1 << 20) {
        upload.append(body.slice(piece << 20..body.len().min((piece + 1) << 20))).await?;
    }
    upload.complete().await
}

fn kind<T: std::fmt::Debug>(result: Result<T, StoreError>) -> StoreErrorKind {
    result.expect_err("the store must refuse this").kind
}

// --- What every store must do ---

#[test]
fn the_suite_on_a_store_in_this_process() {
    if !in_child(&[]) {
        return;
    }
    let store = S3Server::start();
    store.content().page_keys = 7;
    wait_for(conformance::run_all(&S3Backend::open(options(&store)), &key("scratch")));
    let strays: Vec<_> = store.objects().into_keys().filter(|name| !name.starts_with("p/q/")).collect();
    assert!(strays.is_empty(), "outside the prefix: {strays:?}");

    let whole_bucket = S3Options { prefix: String::new(), checksum: Checksum::None, ..options(&S3Server::start()) };
    let store = S3Server::start();
    let backend = S3Backend::open(S3Options { endpoint: Some(store.endpoint()), ..whole_bucket });
    wait_for(conformance::run_all(&backend, &key("scratch")));
}

#[test]
fn the_suite_over_tls() {
    if !in_child(&[]) {
        return;
    }
    let store = S3Server::start_with_tls();
    let directory = tempfile::tempdir().unwrap();
    let ca_file = directory.path().join("ca.pem");
    std::fs::write(&ca_file, store.ca_pem().unwrap()).unwrap();
    let trusting = S3Options { ca_file: Some(ca_file.clone()), ..options(&store) };
    wait_for(async {
        let backend = S3Backend::open(trusting);
        conformance::large_objects_arrive_whole(&backend, &key("scratch")).await;

        let wary = S3Backend::open(options(&store));
        let refused = wary.stat(&key("x")).await.unwrap_err();
        assert_eq!(refused.kind, StoreErrorKind::Misconfigured, "{refused}");
        assert!(refused.hint().unwrap().contains("ca_file"), "{refused}");

        let plain = S3Options { endpoint: Some(store.endpoint().replace("https", "http")), ..options(&store) };
        kind(S3Backend::open(plain).stat(&key("x")).await);
    });
    for (content, word) in [
        ("no certificate", "no certificate"),
        ("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "ca.pem"),
    ] {
        std::fs::write(&ca_file, content).unwrap();
        let options = S3Options { ca_file: Some(ca_file.clone()), prefix: word.into(), ..options(&store) };
        let refused = wait_for(async { S3Backend::open(options).stat(&key("x")).await }).unwrap_err();
        assert!(refused.is(StoreErrorKind::Misconfigured) && refused.to_string().contains(word), "{refused}");
    }
}

/// A store outside, with the variables every S3 tool knows and the name of a bucket to fill.
#[test]
fn the_suite_on_a_store_named_by_the_environment() {
    let Ok(bucket) = std::env::var("SEAWALL_TEST_S3_BUCKET") else {
        eprintln!(
            "skipped: SEAWALL_TEST_S3_BUCKET (beside AWS_ENDPOINT_URL, AWS_REGION, keys) names no bucket to fill"
        );
        return;
    };
    let prefix = format!("conformance-{:08x}", fastrand::u32(..));
    wait_for(suite_on_a_real_store(S3Options { bucket, prefix, ..S3Options::default() }));
}

/// Everything, on a store with conditional writes; on one without: it is refused, and works for a single writer.
async fn suite_on_a_real_store(options: S3Options) {
    let backend = S3Backend::open(options.clone());
    match put(&backend, "first", &pattern(10)).await {
        Ok(()) => {
            conformance::run_all(&backend, &key("scratch")).await;
            conformance::every_page_is_listed(&backend, &key("pages"), 1005).await;
        }
        Err(refused) => {
            assert!(refused.hint().unwrap_or_default().contains("single_writer = true"), "{refused}");
            eprintln!("{refused}: as a single writer");
            let backend = S3Backend::open(S3Options { single_writer: true, ..options });
            conformance::run_for_a_single_writer(&backend, &key("scratch")).await;
            conformance::every_page_is_listed(&backend, &key("pages"), 1005).await;
        }
    }
}

// --- Success lost, strangers, conflicts ---

#[test]
fn a_lost_success_is_found_to_be_ours() {
    if !in_child(&[]) {
        return;
    }
    let store = S3Server::start();
    let backend = S3Backend::open(options(&store));
    wait_for(async {
        let lost = |operation| Rule::new(Fault::CloseAfter).on(operation).key("object").times(1);
        store.fault(lost(Operation::PutObject));
        put(&backend, "object", &pattern(300_000)).await.expect("what is there is ours");
        assert_eq!(store.objects()["p/q/object"].body, pattern(300_000));

        // A stranger was faster: the same words from the store, another put-id.
        store.fault(Rule::new(Fault::CloseBefore).on(Operation::PutObject).key("object").times(1));
        assert_eq!(kind(put(&backend, "object", &pattern(300_000)).await), StoreErrorKind::AlreadyExists);

        // Success told wrongly: a 500 after the object was stored.
        let wrong = Fault::EffectThenAnswer(s3_answer(500, "InternalError", ""));
        store.fault(Rule::new(wrong).on(Operation::PutObject).key("object2").times(1));
        put(&backend, "object2", &pattern(10)).await.expect("what is there is ours");

        let big = pattern(12 << 20);
        store.fault(lost(Operation::CompleteMultipartUpload));
        upload(&backend, "object3", &big).await.expect("the completed upload is ours");
        assert_eq!(store.objects()["p/q/object3"].body, big);
        assert!(store.objects()["p/q/object3"].is_multipart);
        assert_eq!(kind(upload(&backend, "object3", &big).await), StoreErrorKind::AlreadyExists);
        assert_eq!(store.objects().len(), 4, "and the probe");
    });
    store.heal();
    wait_for(async { backend.clean_debris(Duration::ZERO).await }).unwrap();
    assert!(store.unfinished().is_empty());
}

#[test]
fn a_conflict_is_tried_again_and_never_taken_for_an_object() {
    if !in_child(&[]) {
        return;
    }
    let store = S3Server::start();
    let backend = S3Backend::open(options(&store));
    let conflict = || Fault::error(409, "ConditionalRequestConflict");
    wait_for(async {
        store.fault(Rule::new(conflict()).on(Operation::PutObject).key("passing").times(2));
        put(&backend, "passing", &pattern(10)).await.expect("the conflict passed");

        let lasting = store.fault(Rule::new(conflict()).on(Operation::PutObject).key("lasting"));
        assert_eq!(kind(put(&backend, "lasting", &pattern(10)).await), StoreErrorKind::Unavailable);
        store.clear(lasting);
        put(&backend, "lasting", &pattern(10)).await.expect("the caller's next call");

        store.fault(Rule::new(conflict()).on(Operation::CompleteMultipartUpload).key("upload").times(1));
        let (big, count) = (pattern(6 << 20), store.count(Operation::CompleteMultipartUpload));
        assert_eq!(kind(upload(&backend, "upload", &big).await), StoreErrorKind::NotFound, "write it again");
        assert_eq!(store.count(Operation::CompleteMultipartUpload), count + 2, "the probe's, and one");
        upload(&backend, "upload", &big).await.expect("written again");
    });
}

/// "200 OK", and an error in the body; parts that were lost; an upload somebody aborted.
#[test]
fn a_completion_is_believed_only_when_it_happened() {
    if !in_child(&[]) {
        return;
    }
    let store = S3Server::start();
    let backend = S3Backend::open(options(&store));
    let big = pattern(11 << 20);
    wait_for(async {
        let mut upload = backend.begin_upload(&key("one")).await.unwrap();
        upload.append(big.clone()).await.unwrap();
        let failed = Fault::Answer(s3_answer(200, "InternalError", ""));
        let rule = store.fault(Rule::new(failed).on(Operation::CompleteMultipartUpload).key("one"));
        assert_eq!(kind(upload.complete().await), StoreErrorKind::Unavailable);
        assert!(!store.objects().contains_key("p/q/one"));
        store.clear(rule);
        upload.complete().await.expect("a failed completion can be repeated");
        assert_eq!(store.objects()["p/q/one"].body, big);

        let mut upload = backend.begin_upload(&key("two")).await.unwrap();
        upload.append(big.clone()).await.unwrap();
        backend.clean_debris(Duration::ZERO).await.unwrap();
        assert_eq!(kind(upload.complete().await), StoreErrorKind::NotFound, "write it again");
        assert_eq!(kind(upload.append(big.clone()).await), StoreErrorKind::NotFound);

        // A part that fails leaves the upload as it was.
        let mut upload = backend.begin_upload(&key("three")).await.unwrap();
        upload.append(big.slice(..1000)).await.unwrap();
        let denied = Rule::new(Fault::error(403, "AccessDenied")).on(Operation::UploadPart).skip(1);
        let rule = store.fault(denied);
        for _ in 0..2 {
            assert_eq!(kind(upload.append(big.slice(1000..)).await), StoreErrorKind::PermissionDenied);
        }
        store.clear(rule);
        upload.append(big.slice(1000..)).await.unwrap();
        upload.complete().await.unwrap();
        assert_eq!(store.objects()["p/q/three"].body, big);
    });
}

// --- Stores that cannot protect names ---

#[test]
fn a_store_without_conditions_is_refused_unless_one_writer_is_vouched_for() {
    if !in_child(&[]) {
        return;
    }
    let store = S3Server::start();
    store.content().ignores_put_condition = true;
    store.content().ignores_complete_condition = true;
    wait_for(async {
        let refusing = S3Backend::open(options(&store));
        for refused in
            [put(&refusing, "object", &pattern(10)).await, upload(&refusing, "upload", &pattern(6 << 20)).await]
        {
            let refused = refused.unwrap_err();
            assert_eq!((refused.kind, refused.exit_code()), (StoreErrorKind::Misconfigured, ExitCode::Config));
            assert_eq!(refused.disposition(), Disposition::Operator);
            assert!(refused.hint().unwrap().contains("single_writer = true"), "{refused}");
        }
        assert_eq!(store.objects().into_keys().collect::<Vec<_>>(), ["p/q/conditional.probe"]);
        refusing.stat(&key("object")).await.expect("reading is allowed");

        let trusting = S3Backend::open(S3Options { single_writer: true, ..options(&store) });
        conformance::run_for_a_single_writer(&trusting, &key("scratch")).await;
        // What was stored is read back.
        store.fault(Rule::new(Fault::WrongContent).on(Operation::GetObject).key("damaged").times(9));
        assert_eq!(kind(put(&trusting, "damaged", &pattern(10_000)).await), StoreErrorKind::Corrupt);
    });
}

#[test]
fn completions_without_conditions_are_preceded_by_a_look() {
    if !in_child(&[]) {
        return;
    }
    let store = S3Server::start();
    store.content().ignores_complete_condition = true;
    let backend = S3Backend::open(options(&store));
    let big = pattern(6 << 20);
    wait_for(async {
        put(&backend, "taken", &pattern(10)).await.unwrap();
        assert_eq!(kind(upload(&backend, "taken", &big).await), StoreErrorKind::AlreadyExists);
        assert_eq!(store.objects()["p/q/taken"].body, pattern(10));
        upload(&backend, "free", &big).await.unwrap();
        assert_eq!(store.objects()["p/q/free"].body, big);
    });
}

// --- What is sent ---

#[test]
fn objects_are_sent_with_what_was_asked_for() {
    if !in_child(&[]) {
        return;
    }
    let store = S3Server::start();
    let backend = S3Backend::open(S3Options {
        storage_class: StorageClasses { wal: Some("STANDARD_IA".into()), backup: None },
        sse: Some(ServerSideEncryption::S3),
        ..options(&store)
    });
    let segment = "main/1/wal/0000000100000002/0000000100000002000000A7.zst";
    wait_for(async {
        let facts = Facts { raw_crc32: Some(0xBEEF), ..Facts::default() };
        backend.put_new_with(&key(segment), &[pattern(10), pattern(20)], &facts).await.unwrap();
        put(&backend, "main/1/lineage.json", &pattern(10)).await.unwrap();
        // What the store receives is not what was meant: the checksum says so.
        let facts = Facts { stored_crc32: Some(1), ..Facts::default() };
        let refused = backend.put_new_with(&key("damaged"), &[pattern(10)], &facts).await;
        assert_eq!(kind(refused), StoreErrorKind::Unavailable);
    });
    let objects = store.objects();
    let stored = &objects[&format!("p/q/{segment}")];
    assert_eq!(stored.storage_class.as_deref(), Some("STANDARD_IA"));
    assert_eq!(stored.sse.as_deref(), Some("AES256"));
    assert_eq!(stored.metadata["seawall-raw-crc32"], "0000beef");
    assert_eq!(stored.metadata["seawall-put-id"].len(), 32);
    assert_eq!(objects["p/q/main/1/lineage.json"].storage_class, None);
    assert!(!objects.contains_key("p/q/damaged"));
    let conditional = |seen: &s3::Seen| seen.if_none_match.as_deref() == Some("*");
    assert!(store.requests().iter().filter(|seen| seen.operation == Operation::PutObject).all(conditional));
}

// --- Bad answers ---

/// Every refusal: its kind, and words of its hint and message. All but the last column of them pass by themselves.
#[test]
fn refusals_are_told_apart() {
    use StoreErrorKind::*;
    if !in_child(&[]) {
        return;
    }
    let store = S3Server::start();
    let backend = S3Backend::open(options(&store));
    wait_for(async {
        put(&backend, "there", &pattern(1000)).await.unwrap();
        let redirect = Fault::error_with(301, "PermanentRedirect", "", &[("x-amz-bucket-region", "eu-west-1")]);
        let table: Vec<(&str, Fault, StoreErrorKind, &str)> = vec![
            ("bucket", Fault::error(404, "NoSuchBucket"), RootMissing, "bucket"),
            ("denied", Fault::error(403, "AccessDenied"), PermissionDenied, "s3:"),
            ("expired", Fault::error(400, "ExpiredToken"), Credentials, "expired"),
            ("wrong key", Fault::error(403, "InvalidAccessKeyId"), Credentials, "access key"),
            ("secret", Fault::error(403, "SignatureDoesNotMatch"), Credentials, "secret"),
            ("moved", redirect, Misconfigured, "region"),
            ("region", Fault::error(400, "AuthorizationHeaderMalformed"), Credentials, "keys"),
            ("html", Fault::html(404), Misconfigured, "S3 store"),
            ("html", Fault::html(400), Misconfigured, "S3 store"),
            ("garbage", Fault::Garbage(b"SSH-2.0-OpenSSH_9.2\r\n".to_vec()), Misconfigured, "S3 store"),
            ("500", Fault::error(500, "InternalError"), Unavailable, "by itself"),
            ("503", Fault::error(503, "SlowDown"), Unavailable, "fewer"),
            ("429", Fault::status(429), Unavailable, "fewer"),
            ("closed", Fault::CloseBefore, Unavailable, "by itself"),
            ("405", Fault::error(405, "MethodNotAllowed"), ReadOnly, "read-only"),
            ("quota", Fault::error(403, "QuotaExceeded"), NoSpace, "quota"),
            ("kms", Fault::error(400, "KMS.DisabledException"), PermissionDenied, "KMS"),
            ("class", Fault::error(400, "InvalidStorageClass"), Misconfigured, "storage_class"),
            ("argument", Fault::error(400, "InvalidArgument"), Misconfigured, "checksum"),
            ("501", Fault::error(501, "NotImplemented"), Misconfigured, "checksum"),
        ];
        for (what, fault, kind, word) in table {
            let rule = store.fault(Rule::new(fault));
            let attempts = [
                ("put", put(&backend, "new", &pattern(10)).await.err()),
                ("stat", backend.stat(&key("there")).await.err()),
                ("fetch", backend.fetch(&key("there"), 0..10).await.err()),
                ("list", backend.list(None).await.err()),
                ("upload", upload(&backend, "new", &pattern(6 << 20)).await.err()),
            ];
            for (call, refused) in attempts {
                let refused = refused.unwrap_or_else(|| panic!("{what}: {call} must be refused"));
                assert_eq!(refused.kind, kind, "{what}: {call}: {refused}");
                let hint = refused.hint().unwrap_or_default();
                assert!(hint.contains(word), "{what}: {call}: {refused}: {hint}");
                assert!(refused.to_string().contains("s3://archive/p/q"), "{refused}");
            }
            store.clear(rule);
        }
        put(&backend, "new", &pattern(10)).await.expect("and goes on when the cause is gone");
        assert_eq!(backend.stat(&key("there")).await.unwrap(), Some(1000));
    });
}

/// A web server that answers everything, and a bucket that is not there, are no empty archives.
#[test]
fn absence_is_not_concluded_from_anything_but_s3() {
    if !in_child(&[]) {
        return;
    }
    let store = S3Server::start();
    let backend = S3Backend::open(options(&store));
    wait_for(async {
        let rule = store.fault(Rule::new(Fault::html(200)));
        assert_eq!(kind(backend.list(None).await), StoreErrorKind::Misconfigured);
        kind(put(&backend, "object", &pattern(10)).await);
        store.clear(rule);
        let rule = store.fault(Rule::new(Fault::status(404)).on(Operation::HeadObject));
        assert_eq!(backend.stat(&key("object")).await.unwrap(), None, "a GET says so too");
        store.clear(rule);
        let nowhere = S3Backend::open(S3Options { bucket: "nowhere".into(), ..options(&store) });
        assert_eq!(kind(nowhere.stat(&key("object")).await), StoreErrorKind::RootMissing);
        assert_eq!(kind(nowhere.fetch(&key("object"), 0..0).await), StoreErrorKind::RootMissing);
        assert_eq!(kind(nowhere.list(None).await), StoreErrorKind::RootMissing);
        assert_eq!(kind(put(&nowhere, "object", &pattern(10)).await), StoreErrorKind::RootMissing);
    });
}

#[test]
fn answers_that_break_off_are_read_again() {
    if !in_child(&[]) {
        return;
    }
    let store = S3Server::start();
    let backend = S3Backend::open(options(&store));
    let whole = pattern(1 << 20);
    wait_for(async {
        put(&backend, "object", &whole).await.unwrap();
        store.fault(Rule::new(Fault::ShortBody { missing: 1000 }).on(Operation::GetObject).times(2));
        assert_eq!(backend.fetch(&key("object"), 5..1 << 20).await.unwrap(), whole[5..]);
        store.fault(Rule::new(Fault::ShortBody { missing: 1 }).on(Operation::GetObject));
        assert_eq!(kind(backend.fetch(&key("object"), 0..1 << 20).await), StoreErrorKind::Unavailable);
        store.heal();
        store.fault(Rule::new(Fault::TruncatedBody { missing: 1 }).on(Operation::GetObject));
        let refused = kind(backend.fetch(&key("object"), 0..1 << 20).await);
        assert!(matches!(refused, StoreErrorKind::Corrupt | StoreErrorKind::Unavailable), "{refused:?}");
    });
}

// --- Credentials and clocks ---

#[test]
fn rotated_credentials_are_found_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("credentials");
    let variables = [
        ("AWS_ACCESS_KEY_ID", ""),
        ("AWS_SECRET_ACCESS_KEY", ""),
        ("AWS_SHARED_CREDENTIALS_FILE", path.to_str().unwrap()),
    ];
    if !in_child(&variables) {
        return;
    }
    let path = PathBuf::from(std::env::var_os("AWS_SHARED_CREDENTIALS_FILE").unwrap());
    let write = |access: &str, secret: &str| {
        let text = format!("[archive]\naws_access_key_id = {access}\naws_secret_access_key = {secret}\n");
        std::fs::write(&path, text).unwrap();
    };
    let store = S3Server::start();
    write(ACCESS_KEY, SECRET_KEY);
    let backend = S3Backend::open(S3Options { profile: Some("archive".into()), ..options(&store) });
    wait_for(async {
        put(&backend, "one", &pattern(10)).await.unwrap();
        store.expire_key(ACCESS_KEY);
        let refused = put(&backend, "two", &pattern(10)).await.unwrap_err();
        assert_eq!((refused.kind, refused.exit_code()), (StoreErrorKind::Credentials, ExitCode::Permission));
        assert!(!format!("{refused} {refused:?}").contains(SECRET_KEY));
        store.add_key("rotated", "other-secret");
        write("rotated", "other-secret");
        // Sources are read again, but not for each request.
        let recovered = async {
            while let Err(refused) = put(&backend, "two", &pattern(10)).await {
                assert_eq!(refused.kind, StoreErrorKind::Credentials, "{refused}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        tokio::time::timeout(PATIENCE, recovered).await.expect("the new keys are found");
    });
}

#[test]
fn a_wrong_clock_is_corrected() {
    if !in_child(&[]) {
        return;
    }
    let store = S3Server::start();
    let backend = S3Backend::open(options(&store));
    wait_for(async {
        for hours in [3, -5] {
            store.set_clock_offset(SignedDuration::from_hours(hours));
            put(&backend, &format!("object{hours}"), &pattern(10)).await.expect("signed by the store's clock");
        }
    });
}

#[test]
fn no_credentials_is_said() {
    if !in_child(&[("AWS_ACCESS_KEY_ID", ""), ("AWS_SECRET_ACCESS_KEY", "")]) {
        return;
    }
    let store = S3Server::start();
    let backend = S3Backend::open(options(&store));
    let refused = wait_for(async { backend.list(None).await }).unwrap_err();
    assert_eq!(refused.kind, StoreErrorKind::Credentials, "{refused}");
    assert!(refused.hint().unwrap().contains("AWS_ACCESS_KEY_ID"));
}

// --- Debris ---

#[test]
fn abandoned_uploads_are_aborted_below_the_prefix_when_old() {
    if !in_child(&[]) {
        return;
    }
    let store = S3Server::start();
    let backend = S3Backend::open(options(&store));
    let neighbour = S3Backend::open(S3Options { prefix: "p/q2".into(), ..options(&store) });
    wait_for(async {
        let mut kept = Vec::new();
        for backend in [&backend, &neighbour] {
            let mut upload = backend.begin_upload(&key("abandoned")).await.unwrap();
            upload.append(pattern(6 << 20)).await.unwrap();
            kept.push(upload);
        }
        assert_eq!(store.unfinished().len(), 2);
        assert_eq!(backend.clean_debris(Duration::from_secs(3600)).await.unwrap(), 0, "it may be in use");
        assert_eq!(backend.clean_debris(Duration::ZERO).await.unwrap(), 1);
        assert_eq!(store.unfinished().len(), 1, "the neighbour's stays");
        drop(kept);
        store.deny("s3:ListBucketMultipartUploads");
        let refused = backend.clean_debris(Duration::ZERO).await.unwrap_err();
        assert!(refused.hint().unwrap().contains("lifecycle rule"), "{refused}");
    });
}
