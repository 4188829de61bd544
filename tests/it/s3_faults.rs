//! The whole agent on S3 stores that fail: what ends it says why and what to do, what does not end it is outlived;
//! nothing is acknowledged that the store does not hold, and in the end it holds everything.

use std::time::{Duration, SystemTime};

use jiff::SignedDuration;

use crate::support::agent::Agent;
use crate::support::postgres::{self, Builder, Server};
use crate::support::process::eventually;
use crate::support::rig::PATIENCE;
use crate::support::s3::{self, ACCESS_KEY, Fault, Operation, Rule, S3Server, SECRET_KEY, Unfinished, s3_answer};
use crate::support::s3_rig::{Reach, S3Rig, ended};
use crate::support::s3_stores::{self, Store};

/// A server for many agents at once, each with its slot, that keeps the WAL they are compared with.
fn server(major: u32) -> Builder {
    Server::builder(major)
        .wal_segment_mib(1)
        .setting("max_wal_senders", "60")
        .setting("max_replication_slots", "60")
        .setting("max_connections", "120")
        .setting("wal_sender_timeout", "30s")
        .setting("wal_keep_size", "1GB")
        .setting("max_wal_size", "1GB")
}

// --- Refused when it is started ------------------------------------------------------------------------------------

/// What is wrong, the exit code, words of the message and its hint.
struct Refused {
    name: &'static str,
    /// Has the store, or what is configured, be wrong.
    wrong: fn(&S3Server, &mut S3Rig<'_>),
    code: i32,
    words: &'static [&'static str],
}

fn denies(action: &'static str) -> impl Fn(&S3Server) {
    move |store| store.deny(action)
}

const REFUSED: &[Refused] = &[
    Refused {
        name: "no_bucket",
        wrong: |_, rig| rig.reach.bucket = "elsewhere".into(),
        code: 78,
        words: &["NoSuchBucket", "s3://elsewhere/some/prefix", "hint: is the bucket's name right"],
    },
    Refused {
        name: "no_put",
        wrong: |store, _| denies("s3:PutObject")(store),
        code: 77,
        words: &["s3:PutObject: AccessDenied", "hint: allow s3:PutObject"],
    },
    Refused {
        name: "no_get",
        wrong: |store, _| denies("s3:GetObject")(store),
        code: 77,
        words: &["s3:GetObject", "hint: allow s3:GetObject"],
    },
    Refused { name: "no_list", wrong: |store, _| denies("s3:ListBucket")(store), code: 77, words: &["s3:ListBucket"] },
    Refused {
        name: "read_only",
        wrong: |store, _| {
            store.fault(Rule::new(Fault::error(405, "MethodNotAllowed")).on_writes());
        },
        code: 77,
        words: &["MethodNotAllowed", "hint: the store takes no writes there: is it read-only"],
    },
    Refused {
        name: "expired",
        wrong: |store, _| store.expire_key(ACCESS_KEY),
        code: 77,
        words: &["ExpiredToken", "hint: the credentials have expired"],
    },
    Refused {
        name: "wrong_key",
        wrong: |_, rig| rig.write_credentials("stranger", "canary"),
        code: 77,
        words: &["InvalidAccessKeyId", "hint: are the access key and secret right"],
    },
    Refused {
        name: "wrong_secret",
        wrong: |_, rig| rig.write_credentials(ACCESS_KEY, "canary"),
        code: 77,
        words: &["SignatureDoesNotMatch", "hint: the secret key does not fit"],
    },
    Refused {
        name: "no_credentials",
        wrong: |_, rig| rig.write_no_credentials(),
        code: 77,
        words: &["no usable credentials", "AWS_ACCESS_KEY_ID"],
    },
    Refused {
        name: "wrong_region",
        wrong: |store, _| store.set_region("eu-central-1"),
        code: 78,
        words: &["eu-central-1", "hint: set `region`"],
    },
    Refused {
        name: "redirect",
        wrong: |store, _| {
            let headers = [("x-amz-bucket-region", "eu-west-1")];
            let moved = "<Endpoint>bucket.s3.eu-west-1.amazonaws.com</Endpoint>";
            store.fault(Rule::new(Fault::error_with(301, "PermanentRedirect", moved, &headers)));
        },
        code: 78,
        words: &["PermanentRedirect", "eu-west-1", "hint: set `region`"],
    },
    Refused {
        name: "html",
        wrong: |store, _| {
            store.fault(Rule::new(Fault::html(200)));
        },
        code: 78,
        words: &["hint: does `endpoint` name an S3 store"],
    },
    Refused {
        name: "html_404",
        wrong: |store, _| {
            store.fault(Rule::new(Fault::html(404)));
        },
        code: 78,
        words: &["hint: does `endpoint` name an S3 store"],
    },
    Refused {
        name: "garbage",
        wrong: |store, _| {
            store.fault(Rule::new(Fault::Garbage(b"SSH-2.0-OpenSSH_9.6\r\n".to_vec())));
        },
        code: 78,
        words: &["hint: does `endpoint` name an S3 store"],
    },
    Refused {
        name: "no_conditions",
        wrong: |store, _| store.content().ignores_put_condition = true,
        code: 78,
        words: &["single_writer = true"],
    },
];

/// Each with an agent, a slot and a store of its own, all at once: most of it is waiting.
#[test]
fn what_cannot_work_is_refused_at_the_start() {
    let Some(major) = postgres::newest_major() else { return };
    let server = server(major).start();
    std::thread::scope(|scope| {
        for case in REFUSED {
            let server = &server;
            scope.spawn(move || refused_at_the_start(server, case));
        }
        scope.spawn(|| an_authority_that_did_not_sign_is_not_believed(&server));
    });
    let slots = server.value("select count(*) from pg_replication_slots");
    assert_eq!(slots, "0", "a slot whose archive cannot work would only fill the server's disk");
}

fn refused_at_the_start(server: &Server, case: &Refused) {
    let store = S3Server::start();
    let mut rig = S3Rig::new(server, case.name, Reach::of(&store));
    (case.wrong)(&store, &mut rig);
    let (code, said) = ended(&mut rig.start(), PATIENCE);
    assert_eq!(code, Some(case.code), "{}: {said}", case.name);
    for word in case.words {
        assert!(said.contains(word), "{}: no {word:?} in: {said}", case.name);
    }
    assert!(!said.contains("canary"), "{}: {said}", case.name);
    assert!(rig.restart_lsn().is_none(), "{}: nothing was promised to the server", case.name);
}

/// Somebody on the way who shows a certificate of his own.
fn an_authority_that_did_not_sign_is_not_believed(server: &Server) {
    let (store, other) = (S3Server::start_with_tls(), S3Server::start_with_tls());
    let reach = Reach { ca_pem: other.ca_pem().map(str::to_owned), ..Reach::of(&store) };
    let (code, said) = ended(&mut S3Rig::new(server, "intercepted", reach).start(), PATIENCE);
    assert_eq!(code, Some(78), "{said}");
    assert!(said.contains("certificate") && said.contains("ca_file"), "{said}");
    assert!(store.requests().is_empty(), "no request is shown to him");
}

// --- Outlived while streaming --------------------------------------------------------------------------------------

/// Something that goes wrong under an agent that streams.
struct Outlived {
    name: &'static str,
    fault: fn(&S3Server, &S3Rig<'_>),
    /// Words of its log while it lasts; empty where the agent need not notice.
    words: &'static [&'static str],
    /// The end of it, for what [`S3Server::heal`] does not end.
    cure: Option<fn(&S3Server, &S3Rig<'_>)>,
}

const NOTICED: &str = "the repository does not take WAL";

/// What `status` finds out for itself, and says.
const SEEN_BY_STATUS: &[(&str, &str)] = &[
    ("bucket_gone", "NoSuchBucket"),
    ("down", "refused"),
    ("html", "S3 store"),
    ("removed_key", "InvalidAccessKeyId"),
];

fn every_request(fault: Fault) -> impl Fn(&S3Server) {
    move |store| {
        store.fault(Rule::new(fault.clone()));
    }
}

const OUTLIVED: &[Outlived] = &[
    Outlived {
        name: "bucket_gone",
        fault: |store, _| {
            let mut content = store.content();
            let bucket = content.buckets.remove(s3::BUCKET).expect("it was there");
            content.buckets.insert("renamed".into(), bucket);
        },
        words: &[NOTICED, "NoSuchBucket", "is the bucket's name right"],
        cure: Some(|store, _| {
            let mut content = store.content();
            let bucket = content.buckets.remove("renamed").expect("it was renamed");
            assert!(!content.buckets.contains_key(s3::BUCKET), "no bucket is made in its place");
            content.buckets.insert(s3::BUCKET.into(), bucket);
        }),
    },
    Outlived {
        name: "denied_put",
        fault: |store, _| store.deny("s3:PutObject"),
        words: &[NOTICED, "s3:PutObject: AccessDenied", "allow s3:PutObject"],
        cure: None,
    },
    // What an agent reads while it writes, it may do without for a while; then it says so or goes on.
    Outlived { name: "denied_get", fault: |store, _| store.deny("s3:GetObject"), words: &[], cure: None },
    // Without it S3 says "denied" for what is not there, so that every look for a name is refused.
    Outlived {
        name: "denied_list",
        fault: |store, _| store.deny("s3:ListBucket"),
        words: &[NOTICED, "s3:ListBucket"],
        cure: None,
    },
    // A writer needs no right to delete: its tails stay.
    Outlived { name: "denied_delete", fault: |store, _| store.deny("s3:DeleteObject"), words: &[], cure: None },
    Outlived {
        name: "read_only",
        fault: |store, _| {
            store.fault(Rule::new(Fault::error(405, "MethodNotAllowed")).on_writes());
        },
        words: &[NOTICED, "read-only"],
        cure: None,
    },
    Outlived {
        name: "rotated",
        fault: |store, rig| {
            store.expire_key(ACCESS_KEY);
            store.add_key("rotated-access", "rotated-secret");
            rig.write_credentials(ACCESS_KEY, SECRET_KEY);
        },
        words: &[NOTICED, "ExpiredToken", "the credentials have expired"],
        cure: Some(|_, rig| rig.write_credentials("rotated-access", "rotated-secret")),
    },
    Outlived {
        name: "removed_key",
        fault: |store, _| store.remove_key(ACCESS_KEY),
        words: &[NOTICED, "InvalidAccessKeyId"],
        cure: None,
    },
    // Corrected by the store's own clock: nothing to notice.
    Outlived {
        name: "clock_skew",
        fault: |store, _| store.set_clock_offset(SignedDuration::from_hours(-7)),
        words: &[],
        cure: None,
    },
    Outlived {
        name: "wrong_region",
        fault: |store, _| store.set_region("eu-central-1"),
        words: &[NOTICED, "eu-central-1", "set `region`"],
        cure: None,
    },
    Outlived {
        name: "redirect_301",
        fault: |store, _| every_request(Fault::error(301, "PermanentRedirect"))(store),
        words: &[NOTICED, "PermanentRedirect"],
        cure: None,
    },
    Outlived {
        name: "redirect_307",
        fault: |store, _| {
            let headers = [("location", "http://169.254.169.254/latest/meta-data/")];
            store.fault(Rule::new(Fault::error_with(307, "TemporaryRedirect", "", &headers)));
        },
        words: &[NOTICED, "TemporaryRedirect"],
        cure: None,
    },
    Outlived {
        name: "html",
        fault: |store, _| every_request(Fault::html(200))(store),
        words: &[NOTICED, "does `endpoint` name an S3 store"],
        cure: None,
    },
    Outlived {
        name: "garbage",
        fault: |store, _| every_request(Fault::Garbage(b"* OK IMAP4rev1\r\n".to_vec()))(store),
        words: &[NOTICED],
        cure: None,
    },
    Outlived {
        name: "http_500",
        fault: |store, _| every_request(Fault::error(500, "InternalError"))(store),
        words: &[NOTICED, "HTTP 500"],
        cure: None,
    },
    Outlived {
        name: "slow_down",
        fault: |store, _| {
            store.fault(Rule::new(Fault::error_with(503, "SlowDown", "", &[("retry-after", "1")])));
        },
        words: &[NOTICED, "HTTP 503"],
        cure: None,
    },
    Outlived {
        name: "http_429",
        fault: |store, _| every_request(Fault::status(429))(store),
        words: &[NOTICED, "HTTP 429"],
        cure: None,
    },
    Outlived { name: "down", fault: |store, _| store.down(), words: &[NOTICED], cure: Some(|store, _| store.up()) },
    Outlived {
        name: "closed",
        fault: |store, _| every_request(Fault::CloseBefore)(store),
        words: &[NOTICED],
        cure: None,
    },
    // An attempt is given up after 15 s, and is no reason for a word: the next one succeeds.
    Outlived {
        name: "never_answers",
        fault: |store, _| {
            store.fault(Rule::new(Fault::Hang).on(Operation::PutObject).times(1));
        },
        words: &[],
        cure: None,
    },
    Outlived {
        name: "never_answers_success",
        fault: |store, _| {
            store.fault(Rule::new(Fault::HangAfter).on(Operation::PutObject).times(1));
        },
        words: &[],
        cure: None,
    },
    Outlived {
        name: "stops_reading",
        fault: |store, _| {
            store.fault(Rule::new(Fault::StallReading { after: 100 }).on(Operation::PutObject).times(1));
        },
        words: &[],
        cure: None,
    },
    Outlived {
        name: "conflict_409",
        fault: |store, _| {
            store.fault(Rule::new(Fault::error(409, "ConditionalRequestConflict")).on(Operation::PutObject));
        },
        words: &[NOTICED],
        cure: None,
    },
];

/// Small things that go wrong all the time, from the first request to the last.
struct Troubled {
    name: &'static str,
    trouble: fn(&S3Server),
}

const TROUBLED: &[Troubled] = &[
    Troubled {
        name: "success_lost",
        trouble: |store| {
            store.fault(Rule::new(Fault::CloseAfter).on(Operation::PutObject).every(2));
            store.fault(Rule::new(Fault::CloseAfter).on(Operation::DeleteObject).every(3));
        },
    },
    Troubled {
        name: "success_told_wrongly",
        trouble: |store| {
            let wrong = Fault::EffectThenAnswer(s3_answer(500, "InternalError", ""));
            store.fault(Rule::new(wrong).on(Operation::PutObject).every(2));
        },
    },
    Troubled {
        name: "now_and_then_500",
        trouble: |store| {
            store.fault(Rule::new(Fault::error(500, "InternalError")).every(3));
        },
    },
    Troubled {
        name: "now_and_then_throttled",
        trouble: |store| {
            store.fault(Rule::new(Fault::error(503, "SlowDown")).every(4));
        },
    },
    Troubled {
        name: "connections_break",
        trouble: |store| {
            store.fault(Rule::new(Fault::CloseBefore).every(3));
            store.fault(Rule::new(Fault::ShortBody { missing: 3 }).on(Operation::GetObject).every(3));
        },
    },
    Troubled {
        name: "trickles",
        trouble: |store| {
            let slowly = Fault::Trickle { bytes: 200, pause: Duration::from_millis(5) };
            store.fault(Rule::new(slowly).on(Operation::GetObject));
        },
    },
];

/// For a store that gives two keys a page, so that every listing of more is continued.
fn agent_of<'a>(server: &'a Server, name: &str, store: &S3Server) -> S3Rig<'a> {
    store.content().page_keys = 2;
    S3Rig::new(server, name, Reach::of(store))
}

/// All at once, each with an agent, a slot and a store of its own: most of it is waiting.
#[test]
fn what_goes_wrong_later_is_outlived() {
    let Some(major) = postgres::newest_major() else { return };
    let server = server(major).start();
    server.pgbench_init(1);
    // Light, so that so many agents keep up with it on a small machine.
    let load = server.pgbench_background_at(40, 3600);
    std::thread::scope(|scope| {
        let server = &server;
        let outlived = OUTLIVED.iter().map(|case| scope.spawn(move || outlive(server, case)));
        let troubled = TROUBLED.iter().map(|case| scope.spawn(move || be_troubled(server, case)));
        let with_tls = scope.spawn(move || {
            let store = S3Server::start_with_tls();
            let rig = S3Rig::new(server, "tls", Reach::of(&store));
            let agent = streaming(&rig);
            Archiving { rig, agent, held: Held::Here(store) }
        });
        let moto = scope.spawn(move || elsewhere(server, "moto", s3_stores::moto()?, ""));
        let garage = scope.spawn(move || elsewhere(server, "garage", s3_stores::garage()?, "single_writer = true\n"));
        let mut all: Vec<_> = outlived.chain(troubled).chain([with_tls]).collect();
        let mut archiving: Vec<Archiving<'_>> =
            all.drain(..).map(|case| case.join().expect("it is outlived")).collect();
        archiving.extend([moto, garage].into_iter().filter_map(|case| case.join().expect("it works")));
        drop(load);
        server.wait_no_load();
        server.switch_wal();
        for case in archiving {
            scope.spawn(move || case.check_to_the_end());
        }
    });
}

/// An agent, and where it archives to.
struct Archiving<'a> {
    rig: S3Rig<'a>,
    agent: Agent,
    held: Held,
}

enum Held {
    Here(S3Server),
    #[allow(dead_code)] // what runs it, kept until the end
    Elsewhere(Store),
}

impl Archiving<'_> {
    /// Once nothing is written any more: everything is acknowledged, held, and given back as it was.
    fn check_to_the_end(mut self) {
        self.rig.wait_archived(&mut self.agent);
        let status = self.agent.terminate(PATIENCE);
        assert!(status.success(), "{}: {status}", self.rig.slot);
        let compared = match &self.held {
            Held::Here(store) => {
                self.rig.assert_promise(store);
                assert!(store.unfinished().is_empty(), "{}: no upload is left", self.rig.slot);
                self.rig.assert_complete(&self.rig.snapshot(store))
            }
            Held::Elsewhere(_) => self.rig.assert_complete_by_program(),
        };
        assert!(compared > 2, "{}: {compared} segments", self.rig.slot);
        assert!(!self.agent.stderr().contains("panicked"), "{}", self.rig.slot);
    }
}

/// An agent that has archived something.
fn streaming(rig: &S3Rig<'_>) -> Agent {
    let mut agent = rig.start();
    agent.wait_for_log("streaming", PATIENCE);
    rig.wait_archived(&mut agent);
    agent
}

fn outlive<'a>(server: &'a Server, case: &Outlived) -> Archiving<'a> {
    let store = S3Server::start();
    let rig = agent_of(server, case.name, &store);
    let mut agent = streaming(&rig);
    let walsender =
        || server.value(&format!("select active_pid from pg_replication_slots where slot_name = '{}'", rig.slot));
    let before = walsender();
    let begun = store.faulted();
    (case.fault)(&store, &rig);
    for words in case.words {
        agent.wait_for_log(words, PATIENCE);
        rig.assert_promise(&store);
    }
    if let Some((_, words)) = SEEN_BY_STATUS.iter().find(|(name, _)| *name == case.name) {
        let output = rig.run(&["status"]);
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        assert_ne!(output.status.code(), Some(0), "{}: {said}", case.name);
        assert!(said.contains(words), "{}: no {words:?} in {said}", case.name);
    }
    if case.words.is_empty() {
        // Through the end of a segment and the beginning of the next: every kind of request.
        for _ in 0..2 {
            server.switch_wal();
            let written = server.flush_lsn();
            eventually(PATIENCE, &format!("{}: it meets it", rig.slot), || {
                let is_past = rig.restart_lsn().is_some_and(|acknowledged| acknowledged >= written);
                (is_past || store.faulted() > begun).then_some(())
            });
            rig.assert_promise(&store);
        }
    }
    // Waiting attempts are not called off: whatever hangs now goes on hanging.
    match case.cure {
        Some(cure) => cure(&store, &rig),
        None => store.heal(),
    }
    rig.wait_archived(&mut agent);
    rig.assert_promise(&store);
    assert_eq!(walsender(), before, "{}: the connection has stayed", rig.slot);
    if case.words.contains(&NOTICED) {
        agent.wait_for_log("the repository takes WAL again", PATIENCE);
    }
    Archiving { rig, agent, held: Held::Here(store) }
}

fn be_troubled<'a>(server: &'a Server, case: &Troubled) -> Archiving<'a> {
    let store = S3Server::start();
    let rig = agent_of(server, case.name, &store);
    (case.trouble)(&store);
    let mut agent = streaming(&rig);
    for _ in 0..3 {
        rig.wait_archived(&mut agent);
        rig.assert_promise(&store);
    }
    assert!(store.faulted() > 0, "{}: nothing was troubled", rig.slot);
    Archiving { rig, agent, held: Held::Here(store) }
}

/// A store that is another's program, with nothing wrong.
fn elsewhere<'a>(server: &'a Server, name: &str, store: Store, settings: &str) -> Option<Archiving<'a>> {
    let mut rig = S3Rig::new(server, name, store.reach.clone());
    rig.repository_settings.push_str(settings);
    let agent = streaming(&rig);
    Some(Archiving { rig, agent, held: Held::Elsewhere(store) })
}

const HOUR: Duration = Duration::from_secs(3600);

// --- Killed --------------------------------------------------------------------------------------------------------

/// Large segments that do not shrink, and little memory: they are uploaded in parts while they are written.
#[test]
fn an_agent_killed_in_the_middle_of_an_upload_leaves_nothing_that_counts() {
    let Some(major) = postgres::newest_major() else { return };
    let server = Server::builder(major).wal_segment_mib(16).setting("wal_keep_size", "1GB").start();
    let store = S3Server::start();
    let mut rig = agent_of(&server, "killed", &store);
    rig.settings.push_str("memory = \"8MiB\"\n");
    let mut agent = streaming(&rig);
    server.sql("create table noise (bytes bytea)");
    let fill = "insert into noise select decode(string_agg(md5(random()::text || i), ''), 'hex') \
                from generate_series(1, 700000) i group by i % 3500";
    for round in 1..=3 {
        // The part it is killed in: never answered.
        let parts = store.count(Operation::UploadPart);
        let rule = store.fault(Rule::new(Fault::Hang).on(Operation::UploadPart).skip(1));
        server.sql(fill);
        eventually(PATIENCE, "a part is on its way", || (store.count(Operation::UploadPart) > parts + 1).then_some(()));
        agent.kill9();
        store.clear(rule);
        assert!(!store.unfinished().is_empty(), "the upload was under way");
        rig.assert_promise(&store);
        if round == 2 {
            // Two days pass for what was abandoned.
            for upload in store.content().buckets.get_mut(s3::BUCKET).expect("it is there").uploads.values_mut() {
                upload.initiated = SystemTime::now() - 48 * HOUR;
            }
        }
        agent = rig.start();
        rig.wait_archived(&mut agent);
        rig.assert_promise(&store);
        if round == 2 {
            // It may have begun one of its own by now.
            let is_old = |upload: &Unfinished| upload.initiated.elapsed().is_ok_and(|age| age > HOUR);
            let is_clean = || !store.unfinished().iter().any(is_old);
            eventually(PATIENCE, "abandoned uploads are aborted", || is_clean().then_some(()));
        }
    }
    assert!(agent.terminate(PATIENCE).success());
    let multipart = store.objects().values().filter(|stored| stored.is_multipart).count();
    assert!(multipart > 0, "segments were uploaded in parts");
    assert!(rig.assert_complete(&rig.snapshot(&store)) > 1);
}
