//! Owns: a checked configuration written as a file again, for `seawall init` to print.
//! Does not own: what the keys mean (`reference.rs`).

use jiff::tz::TimeZone;

use super::backup::{BackupConfig, CHECKSUMS, COMPRESSIONS};
use super::{
    ClusterConfig, Config, HttpConfig, Location, RepositoryConfig, RetentionConfig, ScheduleConfig, SpoolConfig,
    VerifyConfig,
};
use crate::postgres::Conninfo;
use crate::receiver::Acknowledge;
use crate::replication::base_backup::Checkpoint;
use crate::repository::s3::{Checksum, S3Options, ServerSideEncryption};
use crate::retention::policy::Gfs;
use crate::schedule::Line;
use crate::units::{show_duration, show_size};

impl Config {
    /// A configuration file that says the same. A password is not repeated.
    pub fn to_example_toml(&self) -> String {
        let clusters = self.clusters.iter().map(cluster);
        let mut repositories: Vec<&RepositoryConfig> =
            self.clusters.iter().flat_map(|cluster| &cluster.repositories).collect();
        repositories.sort_by(|a, b| a.name.cmp(&b.name));
        repositories.dedup_by(|a, b| a.name == b.name);
        let shared = self.spool.as_ref().map(spool).into_iter().chain(self.http.as_ref().map(http));
        clusters.chain(repositories.into_iter().map(repository)).chain(shared).collect::<Vec<_>>().join("\n")
    }
}

/// One table, its `=` in one column.
struct Lines(Vec<String>);

impl Lines {
    fn of(table: &str) -> Lines {
        Lines(vec![format!("[{table}]")])
    }

    fn value(&mut self, key: &str, value: impl std::fmt::Display) {
        self.0.push(format!("{key:<14} = {value}"));
    }

    fn text(&mut self, key: &str, text: impl AsRef<str>) {
        self.value(key, toml_string(text.as_ref()));
    }

    fn given(&mut self, key: &str, text: Option<impl AsRef<str>>) {
        if let Some(text) = text {
            self.text(key, text);
        }
    }

    fn unless_empty(self) -> String {
        if self.0.len() == 1 { String::new() } else { self.finish() }
    }

    fn finish(self) -> String {
        self.0.join("\n") + "\n"
    }
}

fn cluster(cluster: &ClusterConfig) -> String {
    let mut lines = Lines::of(&format!("clusters.{}", cluster.name));
    lines.text("postgres", cluster.postgres.to_keywords());
    match &cluster.password_file {
        Some(path) => lines.text("password_file", path.to_string_lossy()),
        None if cluster.postgres.password_in_string() => {
            lines.value("# password_file", "\"/path/to/a/file\"      # the password itself is not repeated here");
        }
        None => {}
    }
    lines.text("slot", &cluster.slot);
    let names: Vec<String> = cluster.repositories.iter().map(|repository| toml_string(&repository.name)).collect();
    lines.value("repositories", format_args!("[{}]", names.join(", ")));
    if cluster.required != cluster.repositories.len() {
        lines.value("required", cluster.required);
    }
    if cluster.acknowledge == Acknowledge::Spool {
        lines.text("acknowledge", "spool");
    }
    if let Some(synchronous) = cluster.synchronous {
        lines.value("synchronous", synchronous);
    }
    if let Some(recipients) = &cluster.encrypt_to {
        // They show themselves as a list of quoted keys, which is TOML's way too.
        lines.value("encrypt_to", format_args!("{recipients:?}"));
    }
    lines.given("identity_file", cluster.identity_file.as_ref().map(|path| path.to_string_lossy()));
    lines.text("tail_interval", show_duration(cluster.tail_interval));
    lines.text("shutdown_grace", show_duration(cluster.shutdown_grace));
    lines.text("memory", show_size(cluster.memory_bytes));
    lines.finish()
        + &backup(&cluster.name, &cluster.backup, &cluster.schedule)
        + &retention(&cluster.name, &cluster.retention)
        + &verify(&cluster.name, &cluster.verify)
}

/// Only what is not said by default.
fn backup(cluster: &str, backup: &BackupConfig, schedule: &ScheduleConfig) -> String {
    let mut lines = Lines::of(&format!("clusters.{cluster}.backup"));
    if !backup.automatic {
        lines.value("automatic", false);
    }
    if schedule.timezone != TimeZone::UTC {
        lines.given("timezone", schedule.timezone.iana_name());
    }
    lines.given("full", schedule.full.as_ref().map(Line::to_string));
    if !schedule.jitter.is_zero() {
        lines.text("jitter", show_duration(schedule.jitter));
    }
    if let Some(kib) = backup.max_rate_kib {
        lines.text("max_rate", show_size(u64::from(kib) << 10));
    }
    if backup.checkpoint != Checkpoint::default() {
        lines.text("checkpoint", "spread");
    }
    lines.given("label", backup.label.as_ref());
    lines.given("from", backup.from.as_ref().map(Conninfo::to_keywords));
    lines.given("compression", word_of(&COMPRESSIONS, backup.compression));
    lines.given("manifest_checksums", word_of(&CHECKSUMS, backup.checksums));
    lines.unless_empty()
}

fn retention(cluster: &str, retention: &RetentionConfig) -> String {
    let mut lines = Lines::of(&format!("clusters.{cluster}.retention"));
    if !retention.automatic {
        lines.value("automatic", false);
    }
    let Some(policy) = &retention.policy else { return lines.unless_empty() };
    lines.given("window", policy.window.map(show_duration));
    if let Some(count) = policy.count {
        lines.value("count", count);
    }
    let Gfs { daily, weekly, monthly, yearly } = policy.gfs;
    let gfs = [("daily", daily), ("weekly", weekly), ("monthly", monthly), ("yearly", yearly)];
    let gfs: Vec<String> =
        gfs.into_iter().filter(|(_, kept)| *kept > 0).map(|(key, kept)| format!("{key} = {kept}")).collect();
    if !gfs.is_empty() {
        lines.value("gfs", format_args!("{{ {} }}", gfs.join(", ")));
    }
    lines.given("full", policy.ages.full.map(show_duration));
    lines.given("differential", policy.ages.differential.map(show_duration));
    lines.given("incremental", policy.ages.incremental.map(show_duration));
    lines.given("wal", policy.wal.map(show_duration));
    lines.unless_empty()
}

fn verify(cluster: &str, verify: &VerifyConfig) -> String {
    let mut lines = Lines::of(&format!("clusters.{cluster}.verify"));
    for (key, line) in [("quick", &verify.quick), ("sample", &verify.sample), ("full", &verify.full)] {
        lines.given(key, line.as_ref().map(Line::to_string));
    }
    if verify.sample_percent != VerifyConfig::default().sample_percent {
        lines.value("sample_percent", verify.sample_percent);
    }
    lines.given("max_rate", verify.max_rate.map(show_size));
    lines.unless_empty()
}

/// `None`: it is the default.
fn word_of<T: Copy + Default + PartialEq>(words: &[(&'static str, T)], value: T) -> Option<&'static str> {
    let word = words.iter().find(|(_, other)| *other == value).map(|(word, _)| *word);
    word.filter(|_| value != T::default())
}

fn repository(repository: &RepositoryConfig) -> String {
    let mut lines = Lines::of(&format!("repositories.{}", repository.name));
    lines.text("url", &repository.url);
    if let Location::S3(options) = &repository.location {
        s3(&mut lines, options);
    }
    lines.finish()
}

fn s3(lines: &mut Lines, options: &S3Options) {
    lines.given("endpoint", options.endpoint.as_ref());
    lines.given("region", options.region.as_ref());
    if let Some(path_style) = options.path_style {
        lines.value("path_style", path_style);
    }
    lines.given("profile", options.profile.as_ref());
    lines.given("ca_file", options.ca_file.as_ref().map(|path| path.to_string_lossy()));
    let classes = [("wal", &options.storage_class.wal), ("backup", &options.storage_class.backup)];
    let classes: Vec<String> = classes
        .into_iter()
        .filter_map(|(key, class)| Some(format!("{key} = {}", toml_string(class.as_ref()?))))
        .collect();
    if !classes.is_empty() {
        lines.value("storage_class", format_args!("{{ {} }}", classes.join(", ")));
    }
    match &options.sse {
        None => {}
        Some(ServerSideEncryption::S3) => lines.text("sse", "s3"),
        Some(ServerSideEncryption::Kms { key: None }) => lines.text("sse", "kms"),
        Some(ServerSideEncryption::Kms { key: Some(key) }) => lines.text("sse", format!("kms:{key}")),
    }
    if options.checksum == Checksum::None {
        lines.text("checksum", "none");
    }
    if options.single_writer {
        lines.value("single_writer", true);
    }
}

fn spool(spool: &SpoolConfig) -> String {
    let mut lines = Lines::of("spool");
    lines.text("path", spool.path.to_string_lossy());
    lines.text("limit", show_size(spool.limit_bytes));
    lines.finish()
}

fn http(http: &HttpConfig) -> String {
    let mut lines = Lines::of("http");
    lines.text("listen", http.listen.to_string());
    lines.given("token_file", http.token_file.as_ref().map(|path| path.to_string_lossy()));
    lines.finish()
}

fn toml_string(text: &str) -> String {
    toml::Value::String(text.to_string()).to_string()
}
