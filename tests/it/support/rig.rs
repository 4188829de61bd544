//! Owns: one server, one repository and the agents between them, as most tests on real servers want it, and what
//! both sides say: the slot, and what is durable, read from the repository.
//! Does not own: any expectation.

use std::fs;
use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use seawall::agent::startup::frontier_of;
use seawall::catalog::contents::TimelineState;
use seawall::catalog::ledger::{FactKind, LedgerFact};
use seawall::catalog::lineage::LineageFile;
use seawall::catalog::store::{self, Archive};
use seawall::repository::{Backend, LocalBackend};
use seawall::wal::{Lsn, TimelineId};

use super::agent::Agent;
use super::postgres::Server;
use super::process::{self, Scratch};

/// For whatever an agent does by itself.
pub const PATIENCE: Duration = process::DEADLINE;

/// For tests that are about WAL alone: the first base backup would be one more thing that happens.
pub const NO_BACKUPS: &str = "backup.automatic = false\n";

#[derive(Debug)]
pub struct Rig {
    pub server: Server,
    pub scratch: Scratch,
    /// Lines of `[clusters.main]` beside the usual ones.
    pub settings: String,
}

/// A slot as the server shows it.
#[derive(Clone, Debug, PartialEq)]
pub struct Slot {
    pub restart_lsn: Option<Lsn>,
    pub wal_status: String,
    pub active: bool,
}

impl Rig {
    pub fn new(server: Server) -> Rig {
        Rig { server, scratch: Scratch::new(), settings: format!("{NO_BACKUPS}tail_interval = \"200ms\"\n") }
    }

    /// The repository's own volume, which a test may take away.
    pub fn repository(&self) -> PathBuf {
        self.scratch.join("repository")
    }

    pub fn config(&self, slot: &str) -> PathBuf {
        let path = self.scratch.join(&format!("{slot}.toml"));
        // Whoever stops an agent in good order expects it to finish, however long that takes.
        let grace = if self.settings.contains("shutdown_grace") { "" } else { "shutdown_grace = \"5min\"\n" };
        let text = format!(
            "[clusters.main]\npostgres = \"{}\"\nslot = \"{slot}\"\nrepositories = [\"local\"]\n{grace}{}\n\
             [repositories.local]\nurl = \"file://{}\"\n",
            self.server.conninfo(),
            self.settings,
            self.repository().display(),
        );
        fs::write(&path, text).expect("a test's file can be written");
        path
    }

    pub fn start(&self) -> Agent {
        self.start_on("seawall")
    }

    pub fn start_on(&self, slot: &str) -> Agent {
        let config = self.config(slot);
        Agent::start(["run", "--config", config.to_str().expect("UTF-8")])
    }

    pub fn slot(&self) -> Option<Slot> {
        self.slot_named("seawall")
    }

    pub fn slot_named(&self, name: &str) -> Option<Slot> {
        let question = format!(
            "select restart_lsn, coalesce(wal_status, ''), active from pg_replication_slots where slot_name = '{name}'"
        );
        let row = self.server.sql(&question).pop()?;
        Some(Slot { restart_lsn: row[0].parse().ok(), wal_status: row[1].clone(), active: row[2] == "t" })
    }

    pub fn restart_lsn(&self) -> Lsn {
        self.slot().and_then(|slot| slot.restart_lsn).expect("a slot that holds WAL")
    }

    /// An agent that has ended may be missed by its walsender a moment later only.
    pub fn drop_slot(&self) {
        const IDLE: &str = "select not active from pg_replication_slots where slot_name = 'seawall'";
        let is_idle = || self.server.value(IDLE) == "t";
        process::eventually(PATIENCE, "the slot is released", || is_idle().then_some(()));
        self.server.sql("select pg_drop_replication_slot('seawall')");
    }

    /// Waits until the server has read the last words of an agent that has ended in good order: the slot is exactly
    /// where the archive ends.
    pub fn wait_slot_is_where_the_archive_ends(&self) -> Lsn {
        process::eventually(PATIENCE, "the slot is where the archive is", || {
            let (restart, durable) = (self.restart_lsn(), self.durable());
            assert!(restart <= durable, "{restart} is acknowledged, {durable} durable");
            (restart == durable).then_some(durable)
        })
    }

    /// Waits until everything written so far is acknowledged.
    pub fn wait_archived(&self) -> Lsn {
        let flushed = self.server.flush_lsn();
        process::eventually(PATIENCE, &format!("{flushed} is acknowledged"), || {
            let restart = self.slot().and_then(|slot| slot.restart_lsn);
            restart.filter(|restart| *restart >= flushed)
        })
    }

    /// A row of WAL's worth of rows.
    pub fn write(&self) {
        self.server.sql("create table if not exists t (i int)");
        self.server.sql("insert into t select generate_series(1, 2000)");
    }

    /// About 60 MB of WAL that compresses badly.
    pub fn write_much(&self) {
        self.server.sql("create table if not exists much (a text, b text)");
        self.server.sql("insert into much select md5(random()::text), md5(i::text) from generate_series(1, 400000) i");
    }

    // --- The repository ---

    pub fn archive(&self) -> (Archive, LineageFile) {
        self.try_archive().expect("the repository holds the cluster")
    }

    pub fn try_archive(&self) -> Option<(Archive, LineageFile)> {
        let backend: Arc<dyn Backend> = Arc::new(LocalBackend::open(self.repository()));
        let lineages = wait_for(store::lineages(backend.as_ref(), "main")).ok()?;
        let (lineage, file) = lineages.into_iter().next_back()?;
        Some((Archive::new(backend, lineage), file))
    }

    pub fn state(&self) -> TimelineState {
        let (archive, file) = self.archive();
        wait_for(archive.frontier(TimelineId(1), file.segment_size)).expect("the repository is readable")
    }

    /// What the repository holds of timeline 1, contiguously: the last record's end.
    pub fn durable(&self) -> Lsn {
        let (_, file) = self.archive();
        frontier_of(&self.state(), file.segment_size).map_or(Lsn::ZERO, |frontier| frontier.stored().record_end)
    }

    pub fn facts(&self, kind: FactKind) -> Vec<LedgerFact> {
        let (archive, _) = self.archive();
        let mut facts = wait_for(archive.ledger()).expect("the ledger is readable");
        facts.retain(|fact| fact.kind == kind);
        facts
    }
}

/// Runs what the library offers as a future only.
pub fn wait_for<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime can be made").block_on(future)
}

/// Resident memory of a process.
pub fn resident_bytes(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the process is there");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("Linux says so");
    let kib: u64 = line.split_whitespace().nth(1).expect("a number follows").parse().expect("a number");
    kib << 10
}
