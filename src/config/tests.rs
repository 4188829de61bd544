use super::*;
use crate::catalog::manifest::ChecksumAlgorithm;
use crate::error::{Advice, ExitCode, Failure};
use crate::postgres::{MemoryEnvironment, Purpose};
use crate::replication::base_backup::{Checkpoint, CompressionMethod};
use crate::repository::s3::{Checksum, ServerSideEncryption, StorageClasses};
use crate::retention::policy::Gfs;
use crate::schedule::Line;

const DAY: Duration = Duration::from_secs(86_400);

const SIMPLE: &str = r#"
[clusters.main]
postgres = "host=db1,db2 user=seawall"
repositories = ["local"]

[repositories.local]
url = "file:///var/lib/seawall"
"#;

fn environment(text: &str) -> MemoryEnvironment {
    MemoryEnvironment::new().with_file("seawall.toml", 0o640, text)
}

fn load(environment: &MemoryEnvironment, flags: Flags) -> Result<Loaded, ConfigError> {
    Config::load(Sources { path: None, environment, flags: &flags })
}

#[track_caller]
fn only(text: &str) -> ClusterConfig {
    let loaded = load(&environment(text), Flags::default()).unwrap();
    loaded.config.cluster(None).unwrap().clone()
}

fn refused(text: &str) -> ConfigError {
    load(&environment(text), Flags::default()).unwrap_err()
}

/// `SIMPLE` with a line more in the cluster's table, which is line 5.
fn with(line: &str) -> String {
    SIMPLE.replace("repositories = [\"local\"]\n", &format!("repositories = [\"local\"]\n{line}\n"))
}

fn flags(postgres: &str, repository_url: &str, slot: &str) -> Flags {
    let given = |text: &str| (!text.is_empty()).then(|| text.to_string());
    Flags { cluster: None, postgres: given(postgres), repository_url: given(repository_url), slot: given(slot) }
}

#[test]
fn file_is_read_with_defaults() {
    let cluster = only(SIMPLE);
    assert_eq!((cluster.name.as_str(), cluster.slot.as_str()), ("main", "seawall"));
    assert_eq!(cluster.postgres.hosts_summary(), "db1:5432, db2:5432");
    assert_eq!(cluster.repositories[0].location, Location::Local("/var/lib/seawall".into()));
    assert_eq!((cluster.tail_interval, cluster.shutdown_grace), (Duration::from_secs(5), Duration::from_secs(10)));
    assert_eq!(cluster.memory_bytes, 32 << 20);
    let loaded = load(&environment(SIMPLE), Flags::default()).unwrap();
    assert_eq!((loaded.path.as_deref(), loaded.warnings.len()), (Some(Path::new("seawall.toml")), 0));
}

#[test]
fn backups_are_taken_by_default_and_as_told() {
    let backup = only(SIMPLE).backup;
    assert!(backup.automatic && backup.max_rate_kib.is_none() && backup.from.is_none());
    let told = "backup = { automatic = false, max_rate = \"50MiB\", checkpoint = \"spread\", label = \"a b\", \
                compression = \"lz4\", manifest_checksums = \"sha256\", from = \"host=db2\" }";
    let backup = only(&with(told)).backup;
    assert_eq!((backup.automatic, backup.max_rate_kib, backup.checkpoint), (false, Some(51200), Checkpoint::Spread));
    assert_eq!((backup.compression, backup.checksums), (Some(CompressionMethod::Lz4), ChecksumAlgorithm::Sha256));
    assert_eq!((backup.label.as_deref(), backup.from.unwrap().hosts_summary().as_str()), (Some("a b"), "db2:5432"));
    for (line, expected) in [
        ("backup.max_rate = \"31KiB\"", "32KiB to 1GiB"),
        ("backup.max_rate = \"2GiB\"", "32KiB to 1GiB"),
        ("backup.checkpoint = \"slow\"", "one of \"fast\", \"spread\""),
        ("backup.label = \"a\\nb\"", "one line of 1 to 1023 bytes"),
        ("backup.compression = \"zstd:3\"", "one of \"none\""),
        ("backup.manifest_checksums = \"md5\"", "one of \"crc32c\""),
        ("backup.automatic = \"no\"", "true or false"),
        ("backup = true", "a table, such as"),
    ] {
        let message = refused(&with(line)).to_string();
        assert!(message.contains(expected), "{message}");
    }
}

const SCHEDULED: &str = r#"
[clusters.main.backup]
full = " 0  2 * * 0"
timezone = "Europe/Berlin"
jitter = "15min"
[clusters.main.retention]
window = "14d"
gfs = { daily = 7, yearly = 3 }
full = "30d"
[clusters.main.verify]
quick = "every 1d"
full = "0 4 * * 6"
sample_percent = 10
max_rate = "50MiB"
"#;

#[test]
fn schedule_retention_and_verifying_are_known_with_and_without_the_server() {
    let text = with(SCHEDULED);
    let cluster = only(&text);
    let schedule = &cluster.schedule;
    assert_eq!(schedule.full.as_ref().map(Line::to_string).as_deref(), Some("0 2 * * 0"));
    assert_eq!((schedule.timezone.iana_name(), schedule.jitter), (Some("Europe/Berlin"), Duration::from_secs(900)));
    let policy = cluster.retention.policy.as_ref().unwrap();
    assert_eq!((policy.window, policy.ages.full), (Some(14 * DAY), Some(30 * DAY)));
    assert_eq!((policy.count, policy.wal, &policy.time_zone), (None, None, &schedule.timezone));
    assert_eq!(policy.gfs, Gfs { daily: 7, weekly: 0, monthly: 0, yearly: 3 });
    let VerifyConfig { quick, sample, full, sample_percent, max_rate } = &cluster.verify;
    assert_eq!((quick, sample), (&Some(Line::Every(DAY)), &None));
    assert_eq!((full.is_some(), *sample_percent, *max_rate), (true, 10, Some(50 << 20)));

    let (environment, flags) = (environment(&text), Flags::default());
    let archives = Config::load_archives(Sources { path: None, environment: &environment, flags: &flags }).unwrap();
    let archive = &archives[0];
    assert_eq!(
        (&archive.schedule, &archive.retention, &archive.verify),
        (schedule, &cluster.retention, &cluster.verify)
    );
    let again = only(&load(&environment, flags).unwrap().config.to_example_toml());
    assert_eq!(format!("{again:?}"), format!("{cluster:?}"));

    let plain = only(SIMPLE);
    assert_eq!(plain.schedule, ScheduleConfig::default());
    assert_eq!(plain.retention, RetentionConfig { automatic: true, policy: None });
    assert_eq!(plain.verify, VerifyConfig::default());
}

#[test]
fn times_that_mean_nothing_are_refused() {
    for (lines, expected) in [
        (
            "backup.full = \"0 2 30 2 *\"",
            "clusters.main.backup.full \"0 2 30 2 *\" in seawall.toml:5: expected a cron line that",
        ),
        (
            "backup.full = \"0 0 2 * * 0\"",
            "five fields (minute, hour, day, month, weekday), such as \"0 2 * * 0\": there are 6",
        ),
        ("backup.full = \"0 24 * * *\"", "expected a cron line of five fields"),
        ("backup.full = \"every 2s\"", "a duration from 1min to 366d"),
        ("backup.full = \"after 50\"", "a size from 1MiB"),
        ("backup.full = \"daily\"", "a schedule such as"),
        ("backup.full = 5", "not a number"),
        ("backup.timezone = \"Berlin\"", "the name of a time zone"),
        ("backup.jitter = \"2d\"", "0s to 1d"),
        ("retention.window = \"0s\"", "longer than 0s"),
        ("retention.full = \"0d\"", "longer than 0s"),
        ("retention.window = \"2 weeks\"", "such as \"500ms\""),
        (
            "retention.count = 0",
            "invalid clusters.main.retention.count \"0\" in seawall.toml:5: expected a number from 1",
        ),
        ("retention.count = -1", "a number from 1 to 100000"),
        ("retention.count = \"3\"", "not text"),
        ("retention.gfs = { daily = 0 }", "invalid clusters.main.retention.gfs.daily \"0\""),
        ("retention.gfs = 7", "a table, such as { daily = 7, weekly = 4, monthly = 12, yearly = 3 }"),
        ("retention.gfs = { hourly = 7 }", "unknown key clusters.main.retention.gfs.hourly"),
        ("retention.widow = \"1d\"", "did you mean retention.window?"),
        ("verify.full = \"after 1GiB\"", "or an interval"),
        ("verify.sample_percent = 0", "a number from 1 to 100"),
        ("verify.max_rate = \"1KiB\"", "at least 32KiB"),
        ("verify.drill = \"0 4 * * 6\"", "clusters.main.verify.drill is not available in this version"),
    ] {
        let error = refused(&with(lines));
        assert!(error.to_string().contains(expected), "{lines}: {error}");
        assert_eq!(error.exit_code(), ExitCode::Config);
    }
    assert!(!refused(&with("backup.full = \"host=x password=canary\"")).to_string().contains("canary"));
}

#[test]
fn what_contradicts_itself_is_refused_with_what_to_do() {
    for (lines, what, hint) in [
        (
            "retention.window = \"6d\"\nbackup.full = \"0 2 * * 0\"",
            "clusters.main.retention.window = 6d is shorter than the 7d between two backups of \
             clusters.main.backup.full (seawall.toml:5)",
            "make it at least 7d, or back up more often",
        ),
        ("retention.full = \"5h\"\nbackup.full = \"every 6h\"", "full = 5h is shorter than the 6h", "at least 6h"),
        (
            "retention = { window = \"14d\", wal = \"7d\" }",
            "wal = 7d is shorter than the window of 14d",
            "at least 14d",
        ),
        ("backup = { full = \"every 1h\", jitter = \"1h\" }", "jitter = 1h is as long as the 1h", "a few minutes"),
    ] {
        let error = refused(&with(lines));
        assert!(error.to_string().contains(what), "{lines}: {error}");
        assert!(error.hint().unwrap().contains(hint), "{error:?}");
        assert_eq!(error.exit_code(), ExitCode::Config);
        let flags = Flags::default();
        let environment = environment(&with(lines));
        assert!(Config::load_archives(Sources { path: None, environment: &environment, flags: &flags }).is_err());
    }
    for lines in [
        "retention.window = \"7d\"\nbackup.full = \"0 2 * * 0\"",
        "retention.window = \"6d\"\nbackup = { full = \"0 2 * * 0\", automatic = false }",
        "retention.window = \"1min\"\nbackup.full = \"after 50GiB\"",
        "retention.wal = \"7d\"",
    ] {
        only(&with(lines));
    }
}

#[test]
fn unknown_keys_name_file_line_and_neighbour() {
    for (text, expected) in [
        (with("solt = \"x\""), "unknown key clusters.main.solt in seawall.toml:5; did you mean slot?"),
        (with("xyzzy = 1"), "unknown key clusters.main.xyzzy in seawall.toml:5"),
        (with("[cluster.b]"), "unknown key cluster in seawall.toml:5; did you mean clusters?"),
        (format!("{SIMPLE}uri = \"x\""), "unknown key repositories.local.uri in seawall.toml:8; did you mean url?"),
        (with("[clusters.main.bakcup]"), "unknown key clusters.main.bakcup in seawall.toml:5"),
        (with("protect = \"primary\""), "clusters.main.protect is not available in this version (seawall.toml:5)"),
        (
            with("[clusters.main.backup]\nincremental = \"every 6h\""),
            "clusters.main.backup.incremental is not available in this version (seawall.toml:6)",
        ),
        (
            with("backup.lable = \"x\""),
            "unknown key clusters.main.backup.lable in seawall.toml:5; did you mean backup.label?",
        ),
        (with("[alerts]"), "[alerts] is not available in this version (seawall.toml:5)"),
        (with("[http]\nlisen = 1"), "unknown key http.lisen in seawall.toml:6; did you mean listen?"),
        (with("[spool]\npath.x = 1"), "invalid spool.path in seawall.toml:6: expected text in quotes"),
        (
            format!("{SIMPLE}storage_class = {{ wla = \"X\" }}"),
            "unknown key repositories.local.storage_class.wla in seawall.toml:8; did you mean storage_class.wal?",
        ),
    ] {
        let error = refused(&text);
        assert!(error.to_string().starts_with(expected), "{error}");
        assert_eq!(error.exit_code(), ExitCode::Config);
    }
}

#[test]
fn bad_values_show_what_is_expected() {
    for (line, expected) in [
        (
            "tail_interval = \"5\"",
            "invalid clusters.main.tail_interval \"5\" in seawall.toml:5: expected a duration such as \"500ms\", \
             \"5s\", \"10min\", \"2h\" or \"14d\", 100ms to 1h",
        ),
        ("tail_interval = 5", "such as \"5s\", not a number"),
        ("tail_interval = \"99ms\"", "100ms to 1h"),
        ("tail_interval = \"61min\"", "100ms to 1h"),
        ("shutdown_grace = \"2h\"", "0s to 1h"),
        ("memory = \"7MiB\"", "a size such as \"32MiB\" or \"64GiB\", at least 8MiB"),
        ("memory = \"32\"", "at least 8MiB"),
        ("slot = \"Sea-Wall\"", "1 to 63 characters"),
        ("slot = \"\"", "1 to 63 characters"),
        ("acknowledge = \"yes\"", "expected \"repository\" or \"spool\""),
        ("acknowledge = \"spool\"", "clusters.main.acknowledge = \"spool\" needs [spool] with a path (seawall.toml:5)"),
        ("synchronous = \"true\"", "expected true or false, such as true, not text"),
        ("synchronous = 1", "not a number"),
        ("required = 0", "\"all\", \"any\" or 1: there is one repository"),
        ("required = 2", "invalid clusters.main.required \"2\" in seawall.toml:5"),
        ("required = \"1\"", "there is one repository"),
        ("required = -1", "there is one repository"),
        ("required = 1.0", "there is one repository"),
        ("encrypt_to = []", "a list of public keys"),
        ("encrypt_to = \"age1x\"", "a list of public keys"),
        ("encrypt_to = [\"age1x\"]", "invalid clusters.main.encrypt_to \"age1x\""),
        ("encrypt_to = [\"ssh-ed25519\"]", "such as [\"age1…\"]"),
        ("identity_file = \"id\"", "an absolute path, such as \"/etc/seawall/identity.txt\""),
        ("password_file = \"secret\"", "an absolute path"),
        ("slot = \"a\"\nslot = \"b\"", "seawall.toml:6: duplicate key"),
        ("slot = \"a", "seawall.toml:5"),
        ("slot = [\"a\"]", "not a list"),
    ] {
        let error = refused(&with(line)).to_string();
        assert!(error.contains(expected), "{line}: {error}");
    }
    assert_eq!(only(&with("tail_interval = \"100ms\"")).tail_interval, Duration::from_millis(100));
    assert_eq!(only(&with("memory = \"8MiB\"")).memory_bytes, 8 << 20);
}

#[test]
fn names_are_checked() {
    for name in ["Main", "a-b", "a__b", "\"\"", "\"a/b\"", "\"..\"", &"x".repeat(41)] {
        let error = refused(&SIMPLE.replace("clusters.main", &format!("clusters.{name}"))).to_string();
        assert!(error.contains("seawall.toml:2") && error.contains("1 to 40 characters"), "{error}");
    }
    assert_eq!(only(&SIMPLE.replace("clusters.main", "clusters.a_1")).name, "a_1");
}

#[test]
fn repository_urls_are_absolute_files() {
    let url = |url: &str| refused(&SIMPLE.replace("file:///var/lib/seawall", url)).to_string();
    for bad in
        ["file://var/lib", "var/lib", "/var/lib", "file:///", "file://", "file:///a/../b", "file:///a?b", "ftp://x"]
    {
        assert!(url(bad).contains("file:///var/lib/seawall"), "{}", url(bad));
    }
    assert!(url("gs://bucket/prefix").contains("a repository at gs:// is not available in this version"));
    assert!(!url("s3://key:canary@bucket").contains("canary"));
    let spaced = only(&SIMPLE.replace("/var/lib/seawall", "/var/lib/sea%20wall"));
    assert_eq!(spaced.repositories[0].location, Location::Local("/var/lib/sea wall".into()));
}

#[test]
fn a_cluster_names_its_repositories() {
    let unknown = refused(&SIMPLE.replace("[\"local\"]", "[\"lcoal\"]"));
    assert_eq!(unknown.hint().unwrap(), "configured: local");
    for bad in ["[]", "\"local\"", "[\"local\", \"local\"]", "[1]"] {
        let error = refused(&SIMPLE.replace("[\"local\"]", bad)).to_string();
        assert!(error.contains("a list of names, each once"), "{error}");
    }
    let left_out = SIMPLE.replace("repositories = [\"local\"]\n", "");
    assert_eq!(only(&left_out).repositories[0].name, "local");
    let two = format!("{left_out}[repositories.other]\nurl = \"file:///x\"\n");
    assert_eq!(refused(&two).to_string(), "clusters.main.repositories is missing");
    let no_url = SIMPLE.replace("url = \"file:///var/lib/seawall\"", "");
    assert_eq!(refused(&no_url).to_string(), "repositories.local.url is missing");
    assert!(refused("[clusters.main]\n").to_string().contains("--repository"));
}

const TWO_REPOSITORIES: &str = r#"
[clusters.main]
repositories = ["offsite", "local"]
required = "any"

[repositories.local]
url = "file:///var/lib/seawall"

[repositories.offsite]
url = "s3://my-bucket/a/b/"
endpoint = "https://store.example:9000/"
region = "eu-central-1"
path_style = true
profile = "backup"
ca_file = "/etc/ca.pem"
storage_class = { wal = "STANDARD_IA", backup = "GLACIER" }
sse = "kms:alias/wal"
checksum = "none"
single_writer = true
"#;

#[test]
fn several_repositories_keep_their_order() {
    let cluster = only(TWO_REPOSITORIES);
    let names: Vec<&str> = cluster.repositories.iter().map(|repository| repository.name.as_str()).collect();
    assert_eq!((names, cluster.required), (vec!["offsite", "local"], 1));
    let Location::S3(s3) = &cluster.repositories[0].location else { panic!("{cluster:?}") };
    let expected = S3Options {
        bucket: "my-bucket".into(),
        prefix: "a/b".into(),
        endpoint: Some("https://store.example:9000".into()),
        region: Some("eu-central-1".into()),
        path_style: Some(true),
        profile: Some("backup".into()),
        ca_file: Some("/etc/ca.pem".into()),
        storage_class: StorageClasses { wal: Some("STANDARD_IA".into()), backup: Some("GLACIER".into()) },
        sse: Some(ServerSideEncryption::Kms { key: Some("alias/wal".into()) }),
        checksum: Checksum::None,
        single_writer: true,
    };
    assert_eq!(*s3, expected);
    for (typed, required) in [("\"all\"", 2), ("2", 2), ("1", 1)] {
        assert_eq!(only(&TWO_REPOSITORIES.replace("\"any\"", typed)).required, required);
    }
    assert_eq!(only(&TWO_REPOSITORIES.replace("required = \"any\"", "")).required, 2);
    let many = refused(&TWO_REPOSITORIES.replace("\"any\"", "3")).to_string();
    assert!(many.contains("expected \"all\", \"any\" or a number from 1 to 2"), "{many}");
    // What a restore needs is known without the server.
    let environment = environment(&TWO_REPOSITORIES.replace("required", "identity_file = \"/id\"\nrequired"));
    let flags = Flags::default();
    let archives = Config::load_archives(Sources { path: None, environment: &environment, flags: &flags }).unwrap();
    assert_eq!((archives[0].repositories.len(), archives[0].identity_file.as_deref()), (2, Some(Path::new("/id"))));
}

#[test]
fn one_place_is_not_two_copies() {
    let same = |first: &str, second: &str| {
        let text = format!(
            "[clusters.c]\nrepositories = [\"a\", \"b\"]\n[repositories.a]\n{first}\n[repositories.b]\n{second}\n"
        );
        load(&environment(&text), Flags::default()).err().map(|error| error.to_string())
    };
    let refused = Some("repositories a and b are the same place (seawall.toml:2)".to_string());
    assert_eq!(same("url = \"file:///x\"", "url = \"file:///x/\""), refused);
    assert_eq!(same("url = \"s3://abc/d\"", "url = \"s3://abc/d/\"\nregion = \"x\""), refused);
    assert_eq!(same("url = \"file:///x\"", "url = \"file:///y\""), None);
    assert_eq!(same("url = \"s3://abc\"", "url = \"s3://abc\"\nendpoint = \"http://127.0.0.1:1\""), None);
}

#[test]
fn s3_repositories_are_checked() {
    let refused = |url: &str, line: &str| {
        let error = refused(&format!("{}{line}\n", SIMPLE.replace("file:///var/lib/seawall", url)));
        assert_eq!(error.exit_code(), ExitCode::Config);
        error.to_string()
    };
    for url in
        ["s3://", "s3://ab", "s3:///prefix", "s3://buc ket", "s3://bucket//a", "s3://bucket/a/../b", "s3://b?x=y"]
    {
        assert!(refused(url, "").contains("s3://bucket/prefix"), "{url}");
    }
    for (line, expected) in [
        ("endpoint = \"store:9000\"", "https://host"),
        ("endpoint = \"https://store/path\"", "without a path"),
        ("endpoint = \"https://user@store\"", "https://host"),
        ("endpoint = \"https://store:0\"", "https://host"),
        ("endpoint = \"https://[::1\"", "https://host"),
        ("region = \"\"", "a region's name"),
        ("path_style = \"yes\"", "true or false"),
        ("ca_file = \"ca.pem\"", "an absolute path"),
        ("storage_class = \"STANDARD_IA\"", "a table, such as { wal = \"STANDARD_IA\", backup = \"STANDARD_IA\" }"),
        ("storage_class = { wal = \"standard\" }", "repositories.local.storage_class.wal \"standard\""),
        ("storage_class.wal = \"DEEP_ARCHIVE\"", "read at once"),
        ("sse = \"aes\"", "\"s3\", \"kms\""),
        ("sse = \"kms:\"", "\"s3\", \"kms\""),
        ("checksum = \"md5\"", "\"crc32\" or \"none\""),
        ("single_writer = 1", "true or false"),
    ] {
        let error = refused("s3://bucket", line);
        assert!(error.contains(expected), "{line}: {error}");
    }
    for line in ["endpoint = \"http://[::1]:9000\"", "endpoint = \"http://localhost\"", "sse = \"s3\""] {
        let text = format!("{}{line}\n", SIMPLE.replace("file:///var/lib/seawall", "s3://bucket"));
        assert!(load(&environment(&text), Flags::default()).unwrap().warnings.is_empty(), "{line}");
    }
    let error = refused("file:///x", "region = \"x\"");
    assert_eq!(error, "repositories.local.region needs an s3:// url (seawall.toml:8)");
    let plain = SIMPLE.replace("\"file:///var/lib/seawall\"", "\"s3://bucket\"\nendpoint = \"http://store:9000\"");
    let warnings = load(&environment(&plain), Flags::default()).unwrap().warnings;
    assert!(warnings.len() == 1 && warnings[0].contains("without encryption: http://store:9000"), "{warnings:?}");
}

#[test]
fn spool_and_http_are_tables_of_their_own() {
    let config = |text: &str| load(&environment(&format!("{SIMPLE}{text}")), Flags::default());
    let loaded = config("[spool]\npath = \"/spool\"\n[http]\n").unwrap().config;
    assert_eq!(loaded.spool, Some(SpoolConfig { path: "/spool".into(), limit_bytes: 10 << 30 }));
    assert_eq!(loaded.http, Some(HttpConfig { listen: "127.0.0.1:9187".parse().unwrap(), token_file: None }));
    let loaded = config("[spool]\npath = \"/s\"\nlimit = \"64MiB\"\n[http]\nlisten = \"[::]:80\"\n").unwrap();
    assert_eq!(loaded.config.spool.unwrap().limit_bytes, 64 << 20);
    assert_eq!(loaded.config.http.unwrap().listen.to_string(), "[::]:80");
    let plain = config("").unwrap().config;
    assert_eq!((plain.spool, plain.http), (None, None));
    for (text, expected) in [
        ("[spool]", "spool.path is missing"),
        ("[spool]\npath = \"x\"", "invalid spool.path \"x\""),
        ("[spool]\npath = \"/s\"\nlimit = \"63MiB\"", "at least 64MiB"),
        ("[spool]\npath = \"/var/lib/seawall/spool\"", "a directory apart from repository local"),
        ("[spool]\npath = \"/var\"", "a directory apart from repository local"),
        ("[spool.main]\npath = \"/s\"", "unknown key spool.main"),
        ("[http]\nlisten = \"localhost:9187\"", "an IP address and a port"),
        ("[http]\nlisten = 9187", "text in quotes, such as \"127.0.0.1:9187\", not a number"),
        ("[http]\ntoken_file = \"t\"", "an absolute path"),
    ] {
        let error = config(text).unwrap_err();
        assert!(error.to_string().contains(expected), "{text}: {error}");
        assert_eq!(error.exit_code(), ExitCode::Config);
    }
    let not_a_table = load(&environment(&format!("http = 1\n{SIMPLE}")), Flags::default()).unwrap_err();
    assert!(not_a_table.to_string().contains("expected a table: [http]"), "{not_a_table}");
    let spooled = with("acknowledge = \"spool\"") + "[spool]\npath = \"/spool\"\n";
    assert_eq!(only(&spooled).acknowledge, Acknowledge::Spool);
}

/// A secret key where a public one belongs is not repeated, wherever it was typed.
#[test]
fn secret_keys_are_never_shown() {
    const SECRET: &str = "AGE-SECRET-KEY-1CANARY";
    let error = refused(&with(&format!("encrypt_to = [\"{SECRET}\"]")));
    assert!(error.to_string().contains("belongs into identity_file"), "{error}");
    let variable = environment(SIMPLE).with_var("SEAWALL__CLUSTERS__MAIN__ENCRYPT_TO", &format!("{KEY},{SECRET}"));
    let other = load(&variable, Flags::default()).unwrap_err();
    for error in [error, other] {
        assert!(!format!("{error} {error:?} {:?}", error.hint()).contains("CANARY"), "{error}");
    }
}

const KEY: &str = "age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p";

#[test]
fn keys_in_variables_are_typed_as_the_key_says() {
    let environment = environment(TWO_REPOSITORIES)
        .with_var("SEAWALL__CLUSTERS__MAIN__REQUIRED", "2")
        .with_var("SEAWALL__CLUSTERS__MAIN__SYNCHRONOUS", "true")
        .with_var("SEAWALL__CLUSTERS__MAIN__ENCRYPT_TO", &format!("{KEY}, {KEY}"))
        .with_var("SEAWALL__REPOSITORIES__OFFSITE__SINGLE_WRITER", "false")
        .with_var("SEAWALL__REPOSITORIES__OFFSITE__STORAGE_CLASS__WAL", "ONEZONE_IA")
        .with_var("SEAWALL__HTTP__LISTEN", "127.0.0.1:1")
        .with_var("SEAWALL__SPOOL__PATH", "/spool");
    let config = load(&environment, Flags::default()).unwrap().config;
    let cluster = &config.clusters[0];
    assert_eq!((cluster.required, cluster.synchronous, cluster.encrypt_to.is_some()), (2, Some(true), true));
    let Location::S3(s3) = &cluster.repositories[0].location else { panic!("{cluster:?}") };
    assert_eq!((s3.single_writer, s3.storage_class.wal.as_deref()), (false, Some("ONEZONE_IA")));
    assert!(config.http.is_some() && config.spool.is_some());
    for (variable, value) in
        [("SYNCHRONOUS", "1"), ("SYNCHRONOUS", ""), ("REQUIRED", "3"), ("REQUIRED", ""), ("ENCRYPT_TO", "")]
    {
        let environment = environment.clone().with_var(&format!("SEAWALL__CLUSTERS__MAIN__{variable}"), value);
        let error = load(&environment, Flags::default()).unwrap_err();
        assert!(error.to_string().contains(&format!("SEAWALL__CLUSTERS__MAIN__{variable}")), "{error}");
    }
}

#[test]
fn variables_win_over_the_file_and_flags_over_both() {
    let environment = environment(&with("slot = \"file\""));
    assert_eq!(load(&environment, Flags::default()).unwrap().config.clusters[0].slot, "file");
    let environment = environment.with_var("SEAWALL__CLUSTERS__MAIN__SLOT", "variable");
    assert_eq!(load(&environment, Flags::default()).unwrap().config.clusters[0].slot, "variable");
    let loaded = load(&environment, flags("host=flag", "file:///flag", "flag")).unwrap();
    let cluster = &loaded.config.clusters[0];
    assert_eq!((cluster.slot.as_str(), cluster.postgres.hosts_summary().as_str()), ("flag", "flag:5432"));
    assert_eq!(cluster.repositories[0].location, Location::Local("/flag".into()));
}

#[test]
fn every_key_can_be_a_variable() {
    for doc in reference() {
        let variable = format!("SEAWALL__{}", doc.key.replace('.', "__").replace("NAME", "X").to_uppercase());
        let value = doc.example.trim_matches(['[', ']', '"']);
        let mut environment = MemoryEnvironment::new()
            .with_var("SEAWALL__REPOSITORIES__LOCAL__URL", "file:///x")
            .with_var("SEAWALL__CLUSTERS__X__REPOSITORIES", "local")
            .with_file("/run/secrets/postgres-dsn", 0o600, "host=db");
        if doc.key.starts_with("repositories") {
            environment = environment
                .with_var("SEAWALL__CLUSTERS__X__REPOSITORIES", "x")
                .with_var("SEAWALL__REPOSITORIES__X__URL", "s3://bucket");
        }
        if doc.key.starts_with("spool") {
            environment = environment.with_var("SEAWALL__SPOOL__PATH", "/spool");
        }
        let loaded = load(&environment.with_var(&variable, value), Flags::default()).unwrap();
        assert_eq!(loaded.config.clusters[0].name, "x", "{variable}");
    }
    for (variable, expected) in [
        ("SEAWALL__CLUSTERS__MAIN__SOLT", "did you mean slot?"),
        ("SEAWALL__CLUSTER__MAIN__SLOT", "did you mean SEAWALL__CLUSTERS__…?"),
        ("SEAWALL__CLUSTERS__SLOT", "did you mean SEAWALL__CLUSTERS__NAME__KEY?"),
        ("SEAWALL__ALERTS__WEBHOOK", "not available in this version"),
        (
            "SEAWALL__CLUSTERS__MAIN__BACKUP__DIFFERENTIAL",
            "clusters.main.backup.differential is not available in this version",
        ),
        ("SEAWALL__CLUSTERS__MAIN__RETENTION__GFS__DALY", "did you mean retention.gfs.daily?"),
        ("SEAWALL__HTTP", "did you mean SEAWALL__HTTP__KEY?"),
        ("SEAWALL__HTTP__LISEN", "did you mean listen?"),
        ("SEAWALL__REPOSITORIES__LOCAL__STORAGE_CLASS__WLA", "did you mean storage_class.wal?"),
        ("SEAWALL__REPOSITORIES__LOCAL__STORAGE_CLASS", "unknown key repositories.local.storage_class"),
        ("SEAWALL__CLUSTERS__A__B__SLOT", "1 to 40 characters"),
    ] {
        let error = load(&environment(SIMPLE).with_var(variable, "canary"), Flags::default()).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains(variable) && !error.contains("canary"), "{error}");
    }
    // Names may begin and end with an underscore.
    let environment = environment(SIMPLE).with_var("SEAWALL__CLUSTERS___A___SLOT", "s");
    assert_eq!(load(&environment, Flags::default()).unwrap().config.cluster(Some("_a_")).unwrap().slot, "s");
}

/// The table of keys and the parser say the same: each example is accepted, each default is what holds without it.
#[test]
fn reference_and_parser_agree() {
    const CLUSTER: &str = "[clusters.c]\nrepositories = [\"local\"]\n";
    for doc in reference() {
        let group = Group::ALL.into_iter().find(|group| doc.key.starts_with(group.name())).unwrap();
        let (key, _) = group.keys().find(|(_, other)| **other == doc).unwrap();
        let config = |value: &str| {
            let line = if value.is_empty() { String::new() } else { format!("{key} = {value}\n") };
            let of = |this: Group, mut text: String| {
                // The key's own line stands first, and instead of what stood there.
                if this == group && !line.is_empty() {
                    let (table, rest) = text.split_once('\n').unwrap();
                    let rest: String = rest
                        .lines()
                        .filter(|other| !other.starts_with(key))
                        .map(|other| format!("{other}\n"))
                        .collect();
                    text = format!("{table}\n{line}{rest}");
                }
                text
            };
            let repository = "[repositories.local]\nurl = \"s3://bucket\"\n".to_string();
            let text = of(Group::Clusters, CLUSTER.to_string())
                + &of(Group::Repositories, repository)
                + &of(Group::Spool, "[spool]\npath = \"/s\"\n".to_string())
                + &of(Group::Http, "[http]\n".to_string());
            let environment = environment(&text).with_file("/run/secrets/postgres-dsn", 0o600, "host=db");
            load(&environment, Flags::default()).unwrap_or_else(|error| panic!("{}: {error}\n{text}", doc.key)).config
        };
        config(doc.example);
        assert!(!doc.effect.is_empty() && !doc.kind.is_empty());
        let is_value =
            |default: &&str| ["true", "false"].contains(default) || default.starts_with('"') && default.ends_with('"');
        let Some(default) = doc.default.filter(is_value) else { continue };
        assert_eq!(format!("{:?}", config("")), format!("{:?}", config(default)), "{}", doc.key);
    }
}

#[test]
fn flags_alone_describe_main() {
    let empty = MemoryEnvironment::new();
    let loaded = load(&empty, flags("host=db user=me", "file:///repo", "s")).unwrap();
    let cluster = loaded.config.cluster(Some("main")).unwrap();
    assert_eq!((cluster.repositories[0].name.as_str(), cluster.slot.as_str()), ("main", "s"));
    assert_eq!(loaded.path, None);

    let error = load(&empty, Flags::default()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "no configuration: seawall.toml, /etc/seawall/seawall.toml not found, and nothing given by flags or variables"
    );
    assert!(error.hint().unwrap().contains("--repository file:///"));
    assert_eq!(error.exit_code(), ExitCode::Config);

    let named = |name: &str| Flags { cluster: Some(name.into()), ..flags("host=db", "file:///repo", "") };
    assert_eq!(load(&empty, named("main")).unwrap().config.clusters[0].name, "main");
    let error = load(&empty, named("x")).unwrap_err();
    assert_eq!(error.hint().unwrap(), "without a configuration file the one cluster is called main");

    let s3 = load(&empty, flags("host=db", "s3://bucket/prefix", "")).unwrap().config;
    assert!(matches!(&s3.clusters[0].repositories[0].location, Location::S3(s3) if s3.prefix == "prefix"));

    for bad in [flags("hots=x", "file:///r", ""), flags("", "file://r", ""), flags("", "file:///r", "A")] {
        assert_eq!(load(&empty, bad).unwrap_err().exit_code(), ExitCode::Usage);
    }
}

#[test]
fn flags_beside_several_clusters_need_a_name() {
    let text = format!("{SIMPLE}[clusters.other]\n");
    let environment = environment(&text);
    let error = load(&environment, flags("", "file:///f", "")).unwrap_err();
    assert_eq!(
        (error.to_string().as_str(), error.exit_code()),
        ("several clusters are configured: main, other", ExitCode::Usage)
    );
    let named = Flags { cluster: Some("main".into()), ..flags("", "file:///f", "") };
    let config = load(&environment, named).unwrap().config;
    assert_eq!(config.cluster(Some("main")).unwrap().repositories[0].url, "file:///f");
    assert_eq!(config.cluster(Some("other")).unwrap().repositories[0].url, "file:///var/lib/seawall");
    assert!(matches!(config.cluster(None), Err(ConfigError::SeveralClusters { .. })));
    assert_eq!(config.cluster(Some("x")).unwrap_err().hint().unwrap(), "configured: main, other");
}

#[test]
fn files_are_searched_in_order() {
    let both = MemoryEnvironment::new()
        .with_file("/etc/seawall/seawall.toml", 0o644, &with("slot = \"etc\""))
        .with_file("/named", 0o644, &with("slot = \"named\""));
    let slot = |environment: &MemoryEnvironment, path: Option<&str>| {
        let flags = Flags::default();
        let loaded = Config::load(Sources { path: path.map(Path::new), environment, flags: &flags });
        loaded.map(|loaded| loaded.config.clusters[0].slot.clone())
    };
    assert_eq!(slot(&both, None).unwrap(), "etc");
    assert_eq!(slot(&both, Some("/named")).unwrap(), "named");
    assert_eq!(slot(&both.clone().with_var("SEAWALL_CONFIG", "/named"), None).unwrap(), "named");
    let here = both.clone().with_file("seawall.toml", 0o644, &with("slot = \"here\""));
    assert_eq!(slot(&here, None).unwrap(), "here");
    let missing = slot(&both, Some("/missing")).unwrap_err();
    assert!(missing.to_string().starts_with("could not read /missing: "));
    assert_eq!(missing.exit_code(), ExitCode::Config);
    let denied = slot(&both.clone().with_unreadable("seawall.toml"), None).unwrap_err();
    assert_eq!(denied.exit_code(), ExitCode::Permission);
    assert_eq!(denied.hint().unwrap(), "may the user seawall runs as read seawall.toml?");
}

#[test]
fn file_writable_by_others_is_refused() {
    for mode in [0o660, 0o602, 0o666] {
        let error =
            load(&MemoryEnvironment::new().with_file("seawall.toml", mode, SIMPLE), Flags::default()).unwrap_err();
        assert_eq!(error.exit_code(), ExitCode::Config);
        assert_eq!(error.hint().unwrap(), "whoever writes it decides where WAL goes; run: chmod go-w seawall.toml");
    }
}

#[test]
fn secrets_can_come_from_files() {
    let environment = environment(&with("password_file = \"/pw\"")).with_file("/pw", 0o600, "canary\n");
    let config = load(&environment, Flags::default()).unwrap().config;
    let logins = config.clusters[0].postgres.logins(Purpose::Physical, &environment).unwrap().logins;
    assert_eq!(logins.len(), 2);
    assert!(logins.iter().all(|login| login.password.as_ref().unwrap().expose() == "canary"));

    let both = with("password_file = \"/pw\"").replace("user=seawall", "user=seawall password=canary");
    let error = refused(&both).to_string();
    assert!(error.contains("clusters.main.password_file and clusters.main.postgres are both given"), "{error}");

    let file = SIMPLE.replace("postgres = \"host=db1,db2 user=seawall\"", "postgres_file = \"/dsn\"");
    let environment = self::environment(&file).with_file("/dsn", 0o600, "host=secret password=canary\n");
    let loaded = load(&environment, Flags::default()).unwrap();
    assert_eq!(
        (loaded.config.clusters[0].postgres.hosts_summary().as_str(), loaded.warnings.len()),
        ("secret:5432", 0)
    );
    let replaced = load(&environment, flags("host=flag", "", "")).unwrap();
    assert_eq!(replaced.config.clusters[0].postgres.hosts_summary(), "flag:5432");
    let error = refused(&with("postgres_file = \"/dsn\"")).to_string();
    assert!(error.contains("clusters.main.postgres and clusters.main.postgres_file are both given"), "{error}");
}

#[test]
fn readable_password_is_warned_of() {
    let text = SIMPLE.replace("user=seawall", "user=seawall password=canary");
    let warnings = |mode| {
        let environment = MemoryEnvironment::new().with_file("seawall.toml", mode, &text);
        load(&environment, Flags::default()).unwrap().warnings
    };
    assert_eq!(warnings(0o600), Vec::<String>::new());
    assert!(warnings(0o644)[0].contains("others may read it (mode 0644)"));
}

#[test]
fn example_reads_back_without_the_password() {
    let text = with("slot = \"s\"\ntail_interval = \"1500ms\"\nmemory = \"1GiB\"")
        .replace("user=seawall", "user='a \\\\'b' password=canary options='-c x=y'");
    let loaded = load(&environment(&text), Flags::default()).unwrap();
    let example = loaded.config.to_example_toml();
    assert!(!example.contains("canary") && example.contains("# password_file"), "{example}");
    let again = only(&example);
    assert_eq!(format!("{:?}", loaded.config.clusters[0]), format!("{again:?}"));
    assert_eq!(again.postgres.to_keywords(), loaded.config.clusters[0].postgres.to_keywords());

    let text = TWO_REPOSITORIES.replace(
        "required",
        &format!(
            "acknowledge = \"spool\"\nsynchronous = false\nencrypt_to = [\"{KEY}\"]\nidentity_file = \"/i\"\nrequired"
        ),
    ) + "[spool]\npath = \"/spool\"\nlimit = \"1TiB\"\n[http]\nlisten = \"0.0.0.0:80\"\ntoken_file = \"/t\"\n";
    let config = load(&environment(&text), Flags::default()).unwrap().config;
    let again = load(&environment(&config.to_example_toml()), Flags::default()).unwrap().config;
    assert_eq!(format!("{config:?}"), format!("{again:?}"));
}

#[test]
fn connection_string_mistakes_tell_where_and_why() {
    let error = refused(&SIMPLE.replace("host=db1", "password=canary gssencmode=require host=db1"));
    let failure = Failure::from(error);
    assert_eq!(
        failure.message,
        "could not understand clusters.main.postgres (seawall.toml:3): \
         gssencmode=require is not available in this version (asked for in the connection string)"
    );
    assert!(failure.hint.unwrap().contains("SCRAM"));
    assert_eq!(failure.exit_code, ExitCode::Config);
}

/// However the file is broken around it: no message, hint or Debug shows the password.
#[test]
fn password_is_never_shown() {
    let good = SIMPLE.replace("user=seawall", "user=seawall password=canary");
    let shown = |text: &str| match load(&environment(text), Flags::default()) {
        Ok(loaded) => format!("{loaded:?}"),
        Err(error) => format!("{error} {error:?} {:?} {}", error.hint(), Failure::from(error.clone())),
    };
    // Cut anywhere, or with any one character lost or replaced.
    for i in 0..good.len() {
        let (before, after) = good.split_at(i);
        let mut rest = after.chars();
        let lost = rest.next();
        for text in [before.to_string(), format!("{before}{}", rest.as_str()), format!("{before}\"{}", rest.as_str())] {
            // A password that lost its keyword's name is a host or user name to anybody.
            let keyword_whole = text.contains("password=canary");
            assert!(!shown(&text).contains("canary") || !keyword_whole, "{lost:?}: {text}\n{}", shown(&text));
        }
    }
    assert!(!format!("{:?}", flags("password=canary", "", "")).contains("canary"));
}
