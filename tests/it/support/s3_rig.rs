//! Owns: how any S3 store is reached, agents that archive to one, and what such an archive holds, read without the
//! program: what is acknowledged is looked for there.
//! Does not own: the stores (`s3.rs`, `s3_stores.rs`), servers (`postgres.rs`).

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;

use seawall::agent::startup::frontier_of;
use seawall::catalog::store::{self, Archive};
use seawall::continuity::{self, GapState};
use seawall::repository::Key;
use seawall::repository::layout::Lineage;
use seawall::restore::wal_get::{Holder, Outcome, PathChoice, WalGet};
use seawall::testkit::store::MemoryStore;
use seawall::wal::{Lsn, SegmentSize, TimelineId};

use super::agent::{self, Agent};
use super::postgres::Server;
use super::process::{self, Scratch};
use super::rig::{PATIENCE, wait_for};
use super::s3::{self, S3Server};

/// A store's address and the way in.
#[derive(Clone, Debug)]
pub struct Reach {
    pub endpoint: String,
    pub bucket: String,
    pub region: String,
    pub access_key: String,
    pub secret_key: String,
    /// The authority of its certificate.
    pub ca_pem: Option<String>,
}

impl Reach {
    pub fn of(store: &S3Server) -> Reach {
        Reach {
            endpoint: store.endpoint(),
            bucket: s3::BUCKET.to_owned(),
            region: s3::REGION.to_owned(),
            access_key: s3::ACCESS_KEY.to_owned(),
            secret_key: s3::SECRET_KEY.to_owned(),
            ca_pem: store.ca_pem().map(str::to_owned),
        }
    }
}

/// One slot of a server and one S3 repository.
#[derive(Debug)]
pub struct S3Rig<'a> {
    pub server: &'a Server,
    pub slot: String,
    pub reach: Reach,
    pub scratch: Scratch,
    /// More lines of `[clusters.main]` and `[repositories.offsite]`.
    pub settings: String,
    pub repository_settings: String,
}

impl S3Rig<'_> {
    pub fn new<'a>(server: &'a Server, slot: &str, reach: Reach) -> S3Rig<'a> {
        let scratch = Scratch::new();
        let mut repository_settings = String::new();
        if let Some(pem) = &reach.ca_pem {
            fs::write(scratch.join("ca.pem"), pem).expect("a test's file can be written");
            repository_settings = format!("ca_file = \"{}\"\n", scratch.join("ca.pem").display());
        }
        let slot = slot.to_owned();
        S3Rig { server, slot, reach, scratch, settings: String::new(), repository_settings }
    }

    fn credentials_file(&self) -> PathBuf {
        self.scratch.join("credentials")
    }

    /// As a rotation does it: the file is there whole, before and after.
    pub fn write_credentials(&self, access_key: &str, secret_key: &str) {
        let text = format!("[default]\naws_access_key_id = {access_key}\naws_secret_access_key = {secret_key}\n");
        let new = self.scratch.join("credentials.new");
        fs::write(&new, text).expect("a test's file can be written");
        fs::rename(&new, self.credentials_file()).expect("our file can be renamed");
    }

    /// A file that names nobody.
    pub fn write_no_credentials(&self) {
        fs::write(self.credentials_file(), "[default]\n").expect("a test's file can be written");
    }

    fn config(&self) -> PathBuf {
        let path = self.scratch.join("seawall.toml");
        let text = format!(
            "[clusters.main]\npostgres = \"{}\"\nslot = \"{}\"\nrepositories = [\"offsite\"]\n\
             backup.automatic = false\ntail_interval = \"200ms\"\n{}\n[repositories.offsite]\nurl = \"s3://{}/some/prefix\"\n\
             endpoint = \"{}\"\nregion = \"{}\"\n{}",
            self.server.conninfo(),
            self.slot,
            self.settings,
            self.reach.bucket,
            self.reach.endpoint,
            self.reach.region,
            self.repository_settings,
        );
        fs::write(&path, text).expect("a test's file can be written");
        path
    }

    /// The program with these arguments, and nothing of this machine's AWS settings.
    pub fn command(&self, arguments: &[&str]) -> Command {
        if !self.credentials_file().exists() {
            self.write_credentials(&self.reach.access_key, &self.reach.secret_key);
        }
        let mut command = agent::command(arguments.iter().copied().chain(["--config"]));
        command.arg(self.config());
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("AWS_")) {
            command.env_remove(name);
        }
        command.env("AWS_EC2_METADATA_DISABLED", "true").env("AWS_CONFIG_FILE", "/dev/null");
        command.env("AWS_SHARED_CREDENTIALS_FILE", self.credentials_file());
        command
    }

    pub fn run(&self, arguments: &[&str]) -> Output {
        process::run(&mut self.command(arguments), PATIENCE)
    }

    pub fn start(&self) -> Agent {
        Agent::spawn(self.command(&["run"]))
    }

    // --- What the server was told ---

    /// Where its slot stands, once it holds WAL.
    pub fn restart_lsn(&self) -> Option<Lsn> {
        let question = format!(
            "select coalesce(restart_lsn::text, '') from pg_replication_slots where slot_name = '{}'",
            self.slot
        );
        self.server.sql(&question).pop()?[0].parse().ok()
    }

    /// Waits until everything written so far is acknowledged.
    pub fn wait_archived(&self, agent: &mut Agent) -> Lsn {
        let flushed = self.server.flush_lsn();
        process::eventually(PATIENCE, &format!("{flushed} is acknowledged on {}", self.slot), || {
            assert!(agent.is_running(), "the agent of {} has ended", self.slot);
            self.restart_lsn().filter(|restart| *restart >= flushed)
        })
    }

    // --- What the store holds ---

    /// A copy of the archive, taken from the store's memory at one instant.
    pub fn snapshot(&self, store: &S3Server) -> MemoryStore {
        let copy = MemoryStore::default();
        copy.tamper(|objects| {
            for (key, stored) in store.objects() {
                let key = key.strip_prefix("some/prefix/").expect("nothing of ours is elsewhere");
                objects.insert(Key::new(key), stored.body);
            }
        });
        copy
    }

    fn archive(copy: &MemoryStore) -> Option<Archive> {
        let lineages = wait_for(store::lineages(copy, "main")).expect("the lineages can be listed");
        Some(Archive::new(Arc::new(copy.clone()), lineages.into_iter().next_back()?.0))
    }

    /// The one lineage in the store, and its segment size.
    pub fn lineage(&self, store: &S3Server) -> (Lineage, SegmentSize) {
        let archive = Self::archive(&self.snapshot(store)).expect("there is a lineage");
        let size = wait_for(archive.lineage_file()).expect("a lineage has its file").segment_size;
        (archive.lineage, size)
    }

    /// The sealed segments in the store, in order.
    pub fn sealed(&self, store: &S3Server) -> Vec<String> {
        let archive = Self::archive(&self.snapshot(store)).expect("there is a lineage");
        let catalog = wait_for(archive.load_catalog()).expect("the catalog can be read");
        let names = catalog.directories().flat_map(|digest| digest.indexed().map(|entry| entry.segment.to_string()));
        names.collect::<BTreeSet<String>>().into_iter().collect()
    }

    /// The end of what a copy holds from its beginning, contiguously.
    pub fn durable(copy: &MemoryStore) -> Lsn {
        let Some(archive) = Self::archive(copy) else { return Lsn::ZERO };
        let size = wait_for(archive.lineage_file()).expect("a lineage has its file").segment_size;
        let state = wait_for(archive.frontier(TimelineId(1), size)).expect("the frontier can be read");
        frontier_of(&state, size).map_or(Lsn::ZERO, |frontier| frontier.stored().record_end)
    }

    /// Nothing is acknowledged that is not there.
    #[track_caller]
    pub fn assert_promise(&self, store: &S3Server) {
        // The slot first: what it says now must be in the store by now.
        let Some(acknowledged) = self.restart_lsn() else { return };
        let copy = self.snapshot(store);
        let Some(archive) = Self::archive(&copy) else { return }; // a slot that was made at its own restart LSN
        let begun = wait_for(archive.lineage_file()).expect("a lineage has its file").start_lsn.unwrap_or(Lsn::ZERO);
        let durable = Self::durable(&copy).max(begun);
        assert!(acknowledged <= durable, "{}: {acknowledged} is acknowledged, {durable} durable", self.slot);
    }

    /// Every segment the server still has, given back by the archive byte for byte; how many, and that none is amiss.
    pub fn assert_complete(&self, copy: &MemoryStore) -> usize {
        let archive = Self::archive(copy).expect("there is a lineage");
        let catalog = wait_for(archive.load_catalog()).expect("the catalog can be read");
        let open: Vec<_> = continuity::gaps(&catalog).into_iter().filter(|gap| gap.state == GapState::Open).collect();
        assert!(open.is_empty(), "{}: {open:#?}", self.slot);
        let holder = Holder::new("offsite", archive);
        let reader = WalGet::new(vec![holder], PathChoice::Latest);
        self.compare(|name, to| {
            let outcome = wait_for(reader.get(name, to)).unwrap_or_else(|error| panic!("{}: {error}", self.slot));
            outcome == Outcome::Delivered
        })
    }

    /// The same by the program, from the store itself.
    pub fn assert_complete_by_program(&self) -> usize {
        self.compare(|name, to| {
            let output = self.run(&["wal-get", name, to.to_str().expect("text")]);
            let stderr = String::from_utf8_lossy(&output.stderr);
            let code = output.status.code();
            assert!(matches!(code, Some(0 | 1)), "{}: wal-get {name}: {code:?}: {stderr}", self.slot);
            code == Some(0)
        })
    }

    /// The archive may begin later than the server's files; once it has begun nothing is missing up to the slot.
    fn compare(&self, get: impl Fn(&str, &std::path::Path) -> bool) -> usize {
        let acknowledged = self.restart_lsn().expect("the slot holds WAL");
        let segment_bytes: u64 = self
            .server
            .value("select setting from pg_settings where name = 'wal_segment_size'")
            .parse()
            .expect("bytes");
        let mut names: Vec<String> = fs::read_dir(self.server.wal_dir())
            .expect("root may list it")
            .filter_map(|entry| entry.expect("listed").file_name().into_string().ok())
            .filter(|name| name.len() == 24 && name.starts_with("00000001"))
            .collect();
        names.sort();
        let mut compared = 0;
        for name in names {
            let high = u64::from_str_radix(&name[8..16], 16).expect("hexadecimal");
            let low = u64::from_str_radix(&name[16..], 16).expect("hexadecimal");
            let start = (high << 32) + low * segment_bytes;
            if start >= acknowledged.0 {
                break; // not written yet: a file kept for later
            }
            let to = self.scratch.join(&name);
            let delivered = get(&name, &to);
            assert!(delivered || compared == 0, "{}: {name} is not there", self.slot);
            if !delivered {
                continue;
            }
            let (ours, theirs) = (fs::read(&to).expect("delivered"), fs::read(self.server.wal_dir().join(&name)));
            let known = (acknowledged.0 - start).min(segment_bytes) as usize;
            assert!(ours[..known] == theirs.expect("wal_keep_size keeps it")[..known], "{}: {name}", self.slot);
            let _ = fs::remove_file(&to);
            compared += 1;
        }
        compared
    }
}

/// Waits for an agent to come to its end by itself: its exit code and what it said.
pub fn ended(agent: &mut Agent, deadline: Duration) -> (Option<i32>, String) {
    let status = agent.wait(deadline);
    (status.code(), agent.stderr())
}
