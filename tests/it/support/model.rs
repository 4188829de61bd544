//! Owns: model servers, model stores and agents on virtual time, for single histories told in order.
//! Does not own: any expectation; seeded histories (`simulation.rs`).

use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use jiff::Timestamp;
use seawall::agent::cluster::{ClusterAgent, State, Status};
use seawall::agent::world::{ClusterOptions, World};
use seawall::archiver::Workers;
use seawall::catalog::ledger::{FactKind, LedgerFact};
use seawall::catalog::store::{self, Archive};
use seawall::codec::encrypt::Keys;
use seawall::error::Failure;
use seawall::receiver::{Acknowledge, Clock};
use seawall::replication::SlotName;
use seawall::testkit::logins::ModelLogins;
use seawall::testkit::store::{FaultyStore, MemoryStore};
use seawall::testkit::wal_writer::WalWriter;
use seawall::testkit::walsender::ModelServer;
use seawall::wal::{Lsn, SegmentSize, SystemId, TimelineId};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub const MIB: u64 = 1 << 20;
pub const SYSTEM: SystemId = SystemId(7_000_000_000_000_000_001);
/// 2026-01-01, when every model begins.
const EPOCH: i64 = 1_767_225_600;

pub fn on_virtual_time(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    runtime.expect("a runtime needs nothing of the machine").block_on(test);
}

/// A primary and what it writes.
pub struct Model {
    pub server: ModelServer,
    pub wal: WalWriter,
    pub started: Instant,
    /// What its agents encrypt to.
    pub keys: Keys,
    xid: u32,
}

impl Model {
    pub fn new() -> Model {
        Model::of(17, SYSTEM)
    }

    pub fn of(major: u32, system_id: SystemId) -> Model {
        let size = SegmentSize::new(MIB).expect("a power of two");
        let start = Lsn(5 * MIB);
        let server = ModelServer::new(system_id, size, start);
        server.with(|state| state.server_version = format!("{major}.1"));
        let mut wal = WalWriter::new(major, system_id, size, TimelineId(1), start);
        wal.noop(120);
        Model { server, wal, started: Instant::now(), keys: Keys::default(), xid: 100 }
    }

    /// Writes and flushes about `bytes` of rows of `value`, and a commit.
    pub fn write(&mut self, bytes: usize, value: u8) -> Lsn {
        let now = Timestamp::from_second(EPOCH).expect("in range") + self.started.elapsed();
        for _ in 0..bytes.div_ceil(4000) {
            self.xid += 1;
            self.wal.insert(self.xid, &vec![value; 4000.min(bytes)]);
        }
        self.wal.commit(self.xid, now);
        self.publish()
    }

    pub fn publish(&self) -> Lsn {
        let flush = self.server.with(|state| state.flush_lsn());
        let bytes = self.wal.bytes(flush..self.wal.flush_lsn()).to_vec();
        self.server.with(|state| state.append(&bytes));
        self.wal.flush_lsn()
    }

    pub fn agent(&self, slot: &str, store: &FaultyStore) -> Running {
        let started = self.started;
        let clock = Clock(Arc::new(move || Timestamp::from_second(EPOCH).expect("in range") + started.elapsed()));
        let world = World {
            dialer: Arc::new(self.server.dialer()),
            logins: Arc::new(ModelLogins),
            backend: Arc::new(store.clone()),
            clock,
            random: Arc::new(Mutex::new(fastrand::Rng::with_seed(7))),
            workers: Workers::inline(),
        };
        let options = ClusterOptions {
            name: "main".into(),
            slot: SlotName::new(slot).expect("a valid name"),
            tail_interval: Duration::from_secs(1),
            shutdown_grace: Duration::from_secs(10),
            memory_bytes: 8 * MIB,
            acknowledge: Acknowledge::Repository,
            spool: None,
            synchronous: None,
            keys: self.keys.clone(),
            host: None,
        };
        let stop = CancellationToken::new();
        let (agent, status) = ClusterAgent::new(world, options, stop.clone());
        Running { task: tokio::spawn(agent.run()), stop, status }
    }

    pub fn restart_lsn(&self, slot: &str) -> Option<Lsn> {
        self.server.with(|state| state.slots.get(slot).and_then(|slot| slot.restart_lsn))
    }

    /// Waits until everything written is acknowledged on `slot`.
    pub async fn wait_acknowledged(&self, slot: &str) {
        let flush = self.wal.flush_lsn();
        eventually(&format!("{flush} is acknowledged on {slot}"), || self.restart_lsn(slot) == Some(flush)).await;
    }
}

/// An agent at work.
pub struct Running {
    pub task: JoinHandle<Result<(), Failure>>,
    pub stop: CancellationToken,
    pub status: watch::Receiver<Status>,
}

impl Running {
    pub async fn wait_state(&self, state: State) {
        eventually(&format!("the agent is {state:?}"), || self.status.borrow().state == state).await;
    }

    /// Waits until it says why it cannot go on.
    pub async fn wait_failure(&self) -> Failure {
        eventually("the agent fails", || self.status.borrow().failure.is_some()).await;
        self.status.borrow().failure.clone().expect("waited for")
    }

    /// It ends by itself, for good.
    pub async fn wait_end(self) -> Failure {
        let ended = tokio::time::timeout(Duration::from_secs(3600), self.task).await;
        ended.expect("the agent ends").expect("no panic").expect_err("only a failure ends an agent")
    }

    pub async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
    }
}

/// Within an hour of virtual time.
pub async fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    for _ in 0..36_000 {
        if is_so() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("{what}: not within an hour");
}

pub async fn archives(memory: &MemoryStore) -> Vec<Archive> {
    let lineages = store::lineages(memory, "main").await.expect("the repository is readable");
    lineages.into_iter().map(|(lineage, _)| Archive::new(Arc::new(memory.clone()), lineage)).collect()
}

pub async fn facts(memory: &MemoryStore, kind: FactKind) -> Vec<LedgerFact> {
    let mut all = Vec::new();
    for archive in archives(memory).await {
        all.extend(archive.ledger().await.expect("the ledger is readable"));
    }
    all.retain(|fact| fact.kind == kind);
    all
}
