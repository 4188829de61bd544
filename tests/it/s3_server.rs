//! The S3 server of these tests, seen by the SDK everybody uses: what it does right, and that each fault is met.
//!
//! What other tests prove with it is worth what it is worth.

use std::time::{Duration, Instant};

use aws_sdk_s3::Client;
use aws_sdk_s3::config::{BehaviorVersion, Credentials, Region, retry::RetryConfig, timeout::TimeoutConfig};
use aws_sdk_s3::error::ProvideErrorMetadata;
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{ChecksumAlgorithm, CompletedMultipartUpload, CompletedPart, EncodingType};
use jiff::SignedDuration;

use crate::support::rig::{PATIENCE, wait_for};
use crate::support::s3::{self, ACCESS_KEY, BUCKET, Fault, Operation, Rule, S3Server, SECRET_KEY, s3_answer};

fn client(store: &S3Server) -> Client {
    client_with(store, ACCESS_KEY, SECRET_KEY, 1)
}

/// One that waits as long as a test may.
fn client_with(store: &S3Server, access: &str, secret: &str, attempts: u32) -> Client {
    let timeouts = TimeoutConfig::builder().operation_attempt_timeout(PATIENCE).connect_timeout(PATIENCE).build();
    let config = aws_sdk_s3::Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new(s3::REGION))
        .endpoint_url(store.endpoint())
        .force_path_style(true)
        .credentials_provider(Credentials::new(access, secret, None, None, "test"))
        .timeout_config(timeouts)
        .retry_config(
            RetryConfig::standard().with_max_attempts(attempts).with_initial_backoff(Duration::from_millis(1)),
        )
        .build();
    Client::from_conf(config)
}

/// The error code of a PUT, `None` when it succeeded.
async fn put(client: &Client, key: &str, body: &[u8]) -> Result<(), String> {
    let body = ByteStream::from(body.to_vec());
    let put = client.put_object().bucket(BUCKET).key(key).if_none_match("*").body(body).send().await;
    put.map(|_| ()).map_err(|error| error.code().map_or_else(|| format!("{error:?}"), str::to_owned))
}

async fn get(client: &Client, key: &str) -> Result<Vec<u8>, String> {
    let got = client.get_object().bucket(BUCKET).key(key).send().await;
    let got = got.map_err(|error| error.code().map_or_else(|| format!("{error:?}"), str::to_owned))?;
    got.body.collect().await.map(|body| body.to_vec()).map_err(|error| format!("{error:?}"))
}

#[test]
fn objects_are_written_read_listed_and_deleted_as_in_s3() {
    let store = S3Server::start();
    wait_for(async {
        let client = client(&store);
        let body: Vec<u8> = (0..100_000u32).flat_map(u32::to_le_bytes).collect();
        let sent = client.put_object().bucket(BUCKET).key("a/whole").if_none_match("*");
        let sent = sent.metadata("seawall-put-id", "7").storage_class("STANDARD_IA".into());
        sent.body(ByteStream::from(body.clone())).send().await.expect("it is stored");
        assert_eq!(put(&client, "a/whole", b"other").await, Err("PreconditionFailed".into()));
        assert_eq!(get(&client, "a/whole").await, Ok(body.clone()));
        let part = client.get_object().bucket(BUCKET).key("a/whole").range("bytes=10-19").send().await.unwrap();
        assert_eq!(part.body.collect().await.unwrap().to_vec(), body[10..20]);
        let head = client.head_object().bucket(BUCKET).key("a/whole").send().await.unwrap();
        assert_eq!((head.content_length(), head.metadata().unwrap()["seawall-put-id"].as_str()), (Some(400_000), "7"));
        assert_eq!(head.storage_class().unwrap().as_str(), "STANDARD_IA");
        let absent = client.head_object().bucket(BUCKET).key("a/absent").send().await.unwrap_err();
        assert!(absent.into_service_error().is_not_found());
        // The CRC-32 the client sends is checked, not believed.
        let wrong = client.put_object().bucket(BUCKET).key("a/wrong").checksum_crc32("AAAAAA==");
        let wrong = wrong.body(ByteStream::from_static(b"x")).send().await.unwrap_err();
        assert_eq!(wrong.code(), Some("BadDigest"));

        for key in ["b/1", "b/2/x", "b/2/y", "b/3 +é", "b/4"] {
            put(&client, key, b"x").await.unwrap();
        }
        store.content().page_keys = 2;
        let pages = client.list_objects_v2().bucket(BUCKET).prefix("b/").delimiter("/");
        let mut pages = pages.encoding_type(EncodingType::Url).into_paginator().send();
        let (mut objects, mut groups, mut count) = (Vec::new(), Vec::new(), 0);
        while let Some(page) = pages.next().await {
            let page = page.unwrap();
            objects.extend(page.contents().iter().map(|object| object.key().unwrap().to_owned()));
            groups.extend(page.common_prefixes().iter().map(|group| group.prefix().unwrap().to_owned()));
            count += 1;
        }
        assert_eq!((objects, groups, count), (vec_of(&["b/1", "b/3%20%2B%C3%A9", "b/4"]), vec_of(&["b/2/"]), 2));
        client.delete_object().bucket(BUCKET).key("b/1").send().await.unwrap();
        assert_eq!(get(&client, "b/1").await, Err("NoSuchKey".into()));
        let elsewhere = client.head_bucket().bucket("elsewhere").send().await.unwrap_err();
        assert!(elsewhere.into_service_error().is_not_found());
    });
}

fn vec_of(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| word.to_string()).collect()
}

async fn multipart(client: &Client, key: &str, parts: &[Vec<u8>]) -> Result<(), String> {
    let begun = client.create_multipart_upload().bucket(BUCKET).key(key);
    let begun =
        begun.checksum_algorithm(ChecksumAlgorithm::Crc32).metadata("seawall-put-id", "9").send().await.unwrap();
    let id = begun.upload_id().unwrap();
    let mut completed = CompletedMultipartUpload::builder();
    for (number, part) in (1..).zip(parts) {
        let sent = client.upload_part().bucket(BUCKET).key(key).upload_id(id).part_number(number);
        let sent = sent.checksum_algorithm(ChecksumAlgorithm::Crc32).body(ByteStream::from(part.clone()));
        let sent = sent.send().await.unwrap();
        let part = CompletedPart::builder().part_number(number).e_tag(sent.e_tag().unwrap());
        completed = completed.parts(part.set_checksum_crc32(sent.checksum_crc32().map(str::to_owned)).build());
    }
    let complete = client.complete_multipart_upload().bucket(BUCKET).key(key).upload_id(id).if_none_match("*");
    let complete = complete.multipart_upload(completed.build()).send().await;
    complete.map(|_| ()).map_err(|error| error.code().unwrap_or("?").to_owned())
}

#[test]
fn multipart_uploads_appear_whole_and_once() {
    let store = S3Server::start();
    wait_for(async {
        let client = client(&store);
        let parts = [vec![1; 5 << 20], vec![2; 1000]];
        assert_eq!(multipart(&client, "m", &parts).await, Ok(()));
        assert_eq!(get(&client, "m").await, Ok(parts.concat()));
        assert_eq!(store.objects()["m"].metadata["seawall-put-id"], "9");
        assert_eq!(multipart(&client, "m", &parts).await, Err("PreconditionFailed".into()));
        assert_eq!(multipart(&client, "small", &[vec![1; 10], vec![2; 10]]).await, Err("EntityTooSmall".into()));
        let listed = client.list_multipart_uploads().bucket(BUCKET).send().await.unwrap();
        assert_eq!((listed.uploads().len(), store.unfinished().len()), (2, 2));
        for upload in listed.uploads() {
            let abort = client.abort_multipart_upload().bucket(BUCKET).key(upload.key().unwrap());
            abort.upload_id(upload.upload_id().unwrap()).send().await.unwrap();
        }
        assert!(store.unfinished().is_empty());
        store.fault(
            Rule::new(Fault::Answer(s3_answer(200, "InternalError", ""))).on(Operation::CompleteMultipartUpload),
        );
        assert_eq!(multipart(&client, "said", &parts).await, Err("InternalError".into()));
        assert!(!store.objects().contains_key("said"));
    });
}

#[test]
fn keys_clock_region_and_policy_are_checked() {
    let store = S3Server::start();
    wait_for(async {
        let ours = client(&store);
        put(&ours, "a", b"x").await.unwrap();
        let stranger = client_with(&store, "stranger", "secret", 1);
        assert_eq!(put(&stranger, "b", b"x").await, Err("InvalidAccessKeyId".into()));
        let liar = client_with(&store, ACCESS_KEY, "wrong", 1);
        assert_eq!(put(&liar, "b", b"x").await, Err("SignatureDoesNotMatch".into()));
        store.add_key("next", "other");
        store.expire_key(ACCESS_KEY);
        assert_eq!(put(&ours, "b", b"x").await, Err("ExpiredToken".into()));
        assert_eq!(put(&client_with(&store, "next", "other", 1), "b", b"x").await, Ok(()));
        store.heal();
        store.set_region("eu-central-1");
        assert_eq!(put(&ours, "c", b"x").await, Err("AuthorizationHeaderMalformed".into()));
        store.heal();
        store.set_clock_offset(SignedDuration::from_hours(1));
        assert_eq!(put(&client(&store), "c", b"x").await, Err("RequestTimeTooSkewed".into()));
        let outcome = put(&client_with(&store, ACCESS_KEY, SECRET_KEY, 3), "c", b"x").await;
        assert_eq!(outcome, Ok(()), "the SDK corrects it: {:?}", store.requests());
        store.heal();
        store.deny("s3:PutObject");
        assert_eq!(put(&ours, "d", b"x").await, Err("AccessDenied".into()));
        assert_eq!(get(&ours, "absent").await, Err("NoSuchKey".into()));
        store.deny("s3:ListBucket");
        assert_eq!(get(&ours, "absent").await, Err("AccessDenied".into()));
        assert_eq!(get(&ours, "a").await, Ok(b"x".to_vec()));
        store.heal();
        assert_eq!(put(&ours, "d", b"x").await, Ok(()));
        store.content().ignores_put_condition = true;
        assert_eq!(put(&ours, "d", b"y").await, Ok(()), "as stores do that ignore conditions");
    });
}

#[test]
fn every_fault_is_met_and_counted() {
    let store = S3Server::start();
    wait_for(async {
        let client = client(&store);
        let body = vec![7; 50_000];
        let slow = Duration::from_millis(200);
        let only_put = |fault: Fault| Rule::new(fault).on(Operation::PutObject);
        for (key, fault, is_stored) in [
            ("error", Fault::error(503, "SlowDown"), false),
            ("html", Fault::html(200), false),
            ("garbage", Fault::Garbage(b"220 smtp.example.com\r\n".to_vec()), false),
            ("before", Fault::CloseBefore, false),
            ("after", Fault::CloseAfter, true),
            ("hang", Fault::Hang, false),
            ("hang_after", Fault::HangAfter, true),
            ("stall", Fault::StallReading { after: 10 }, false),
            ("told_wrongly", Fault::EffectThenAnswer(s3_answer(500, "InternalError", "")), true),
        ] {
            let rule = store.fault(only_put(fault.clone()).key(key));
            let before = store.faulted();
            // Of those that hang nothing more is heard once they were met: whoever waits gives up.
            let given_up = async {
                let hangs = matches!(fault, Fault::Hang | Fault::HangAfter | Fault::StallReading { .. });
                while !hangs || store.faulted() == before {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                tokio::time::sleep(Duration::from_millis(200)).await;
            };
            let outcome = tokio::select! {
                outcome = put(&client, key, &body) => outcome,
                () = given_up => Err("it hangs".to_owned()),
            };
            // A page that says 200 is a success to the SDK: whoever uses it has to look closer.
            assert_eq!(outcome.is_err(), key != "html", "{key}: {outcome:?}");
            assert_eq!(store.objects().contains_key(key), is_stored, "{key}");
            store.clear(rule);
        }
        assert_eq!((store.count(Operation::PutObject), store.faulted()), (9, 9));
        put(&client, "read", &body).await.unwrap();
        for fault in [
            Fault::StallBody { after: 10 },
            Fault::Trickle { bytes: 10_000, pause: slow },
            Fault::ShortBody { missing: 1 },
            Fault::TruncatedBody { missing: 1 },
            Fault::WrongContent,
        ] {
            let rule = store.fault(Rule::new(fault.clone()).on(Operation::GetObject));
            let begun = Instant::now();
            let got = tokio::time::timeout(Duration::from_millis(500), get(&client, "read")).await;
            assert_ne!(got, Ok(Ok(body.clone())), "{fault:?} after {:?}", begun.elapsed());
            store.clear(rule);
        }
        store.fault(Rule::new(Fault::status(500)).on(Operation::GetObject).skip(1).times(1));
        assert!(get(&client, "read").await.is_ok());
        assert!(get(&client, "read").await.is_err());
        assert!(get(&client, "read").await.is_ok());
    });
}

#[test]
fn it_goes_down_and_comes_back_with_its_port_and_content() {
    let store = S3Server::start();
    wait_for(async {
        let client = client(&store);
        put(&client, "a", b"x").await.unwrap();
        for _ in 0..3 {
            store.down();
            assert!(get(&client, "a").await.is_err());
            store.up();
            assert_eq!(get(&client, "a").await, Ok(b"x".to_vec()));
        }
    });
}
