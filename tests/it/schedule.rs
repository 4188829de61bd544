//! Scheduled backups of a real server, by a clock of the test's own: what is missed is caught up on once, also by the next
//! process; two agents take one; WAL may decide; one that hangs is given up and the next goes through.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use seawall::agent::backup::keeper::Keeper;
use seawall::agent::backup::{BackupSettings, HUNG_AFTER};
use seawall::agent::cluster::ClusterAgent;
use seawall::agent::world::{ClusterOptions, LoginSource, Repository, World};
use seawall::archiver::Workers;
use seawall::backup::BackupOptions;
use seawall::catalog::ledger::FactKind;
use seawall::codec::encrypt::Keys;
use seawall::config::ScheduleConfig;
use seawall::error::Failure;
use seawall::monitor::health::BackupFacts;
use seawall::postgres::{Conninfo, Purpose, SystemEnvironment, TargetSessionAttrs};
use seawall::receiver::{Acknowledge, Clock};
use seawall::replication::{Login, NetDialer, SlotName};
use seawall::schedule::Line;
use seawall::testkit::store::MemoryStore;
use tokio::runtime::Runtime;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::support::model;
use crate::support::postgres::{self, Server};

const PATIENCE: Duration = Duration::from_secs(180);
const DAY: i64 = 86_400;

/// One server, one store, and a clock that is put forward and back.
struct Stage {
    server: Server,
    store: MemoryStore,
    ahead: Arc<AtomicI64>,
    runtime: Runtime,
}

/// A process's worth of agent.
struct Process {
    tasks: Vec<JoinHandle<()>>,
    stop: CancellationToken,
    facts: watch::Receiver<BackupFacts>,
}

#[derive(Debug)]
struct TheLogins(Conninfo);

impl LoginSource for TheLogins {
    fn logins(&self, purpose: Purpose) -> Result<Vec<Login>, Failure> {
        Ok(self.0.logins(purpose, &SystemEnvironment)?.logins)
    }

    fn wanted(&self) -> TargetSessionAttrs {
        TargetSessionAttrs::Any
    }
}

impl Stage {
    fn new() -> Option<Stage> {
        let server = Server::builder(postgres::newest_major()?).wal_segment_mib(1).start();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let runtime = runtime.expect("a runtime needs nothing of the machine");
        Some(Stage { server, store: MemoryStore::default(), ahead: Arc::default(), runtime })
    }

    fn now(&self) -> Timestamp {
        Timestamp::now() + SignedDuration::from_secs(self.ahead.load(SeqCst))
    }

    fn forward(&self, seconds: i64) {
        self.ahead.fetch_add(seconds, SeqCst);
    }

    fn start(&self, line: &str) -> Process {
        self.start_on(line, &self.server.tcp_conninfo(), HUNG_AFTER)
    }

    fn start_on(&self, line: &str, conninfo: &str, hung_after: Duration) -> Process {
        let _inside = self.runtime.enter();
        let ahead = self.ahead.clone();
        let clock = move || Timestamp::now() + SignedDuration::from_secs(ahead.load(SeqCst));
        let conninfo = Conninfo::parse(conninfo, &SystemEnvironment).expect("a connection string");
        let world = World {
            dialer: Arc::new(NetDialer),
            logins: Arc::new(TheLogins(conninfo)),
            repositories: vec![Repository { name: "memory".into(), backend: Arc::new(self.store.clone()) }],
            clock: Clock(Arc::new(clock)),
            random: Arc::new(Mutex::new(fastrand::Rng::new())),
            workers: Workers::threads(1),
        };
        let options = ClusterOptions {
            name: "main".into(),
            slot: SlotName::new("seawall").expect("a valid name"),
            tail_interval: Duration::from_millis(200),
            shutdown_grace: Duration::from_secs(10),
            memory_bytes: 32 << 20,
            required: 1,
            acknowledge: Acknowledge::Repository,
            spool: None,
            synchronous: None,
            keys: Keys::default(),
            host: None,
        };
        let schedule = ScheduleConfig { full: Some(Line::parse(line).expect("a line")), ..ScheduleConfig::default() };
        let backups =
            BackupSettings { automatic: true, options: BackupOptions::default(), from: None, schedule, hung_after };
        let stop = CancellationToken::new();
        let (agent, status) = ClusterAgent::new(world.clone(), options.clone(), stop.clone());
        let turns = Arc::new(Semaphore::new(1));
        let (keeper, facts) = Keeper::new(world, options, backups, status, turns, stop.clone());
        let agent = async move {
            let _ = agent.run().await;
        };
        Process { tasks: vec![tokio::spawn(agent), tokio::spawn(keeper.run())], stop, facts }
    }

    /// Backups that were begun at all, and those that are complete.
    fn backups(&self) -> (usize, usize) {
        self.runtime.block_on(async {
            let (mut begun, mut complete) = (0, 0);
            for archive in model::archives(&self.store).await {
                let shelf = archive.shelf().await.expect("the repository is readable");
                begun += shelf.records.len();
                complete += shelf.complete().count();
            }
            (begun, complete)
        })
    }

    /// Waits until the keeper has looked at so many backups and found no more to do.
    fn wait_settled(&self, process: &Process, count: usize) {
        let mut facts = process.facts.clone();
        let id = |facts: &BackupFacts| facts.last.as_ref().map(|last| last.id.clone());
        let settled = async {
            loop {
                let newest = id(&facts.borrow_and_update());
                let is_idle = facts.borrow().running.is_none() && facts.borrow().next.is_some();
                let mut ids = std::collections::BTreeSet::new();
                for archive in model::archives(&self.store).await {
                    let shelf = archive.shelf().await.expect("the repository is readable");
                    ids.extend(shelf.complete().map(|file| file.id.to_string()));
                }
                let is_last = newest.is_some() && newest.as_ref() == ids.last();
                if is_idle && is_last && ids.len() >= count {
                    return;
                }
                facts.changed().await.expect("the keeper runs");
            }
        };
        let settled = self.runtime.block_on(async { tokio::time::timeout(PATIENCE, settled).await });
        settled.unwrap_or_else(|_| panic!("{count} backups: {:?}, {:?}", self.backups(), process.facts.borrow()));
    }

    fn end(&self, process: Process) {
        process.stop.cancel();
        self.runtime.block_on(async {
            for task in process.tasks {
                tokio::time::timeout(PATIENCE, task).await.expect("it ends when told to").expect("no panic");
            }
        });
    }
}

#[test]
fn what_was_missed_is_caught_up_on_once_also_by_the_next_process() {
    let Some(stage) = Stage::new() else { return };
    let process = stage.start("0 2 * * *");
    stage.wait_settled(&process, 1);
    let next = process.facts.borrow().next.clone().expect("a next one");
    assert!(next.at.expect("a time") > stage.now() && next.because == "0 2 * * *", "{next:?}");
    // Its time comes while the process runs.
    stage.forward(DAY);
    stage.wait_settled(&process, 2);
    stage.end(process);
    // Five days with nobody there.
    stage.forward(5 * DAY);
    let process = stage.start("0 2 * * *");
    stage.wait_settled(&process, 3);
    let next = process.facts.borrow().next.clone().expect("a next one");
    assert!(next.at.expect("a time") > stage.now(), "{next:?}");
    assert_eq!(stage.backups(), (3, 3));
    stage.end(process);
}

#[test]
fn two_agents_take_one() {
    let Some(stage) = Stage::new() else { return };
    let processes = [stage.start("every 6h"), stage.start("every 6h")];
    // One of them streams; which, nobody knows.
    let count = |count: usize| {
        crate::support::process::eventually(PATIENCE, &format!("{count} backups"), || {
            (stage.backups().1 >= count).then_some(())
        });
    };
    count(1);
    stage.forward(7 * 3600);
    count(2);
    let [one, other] = processes;
    stage.end(one);
    stage.end(other);
    // Whoever is next finds nothing due.
    let process = stage.start("every 6h");
    stage.wait_settled(&process, 2);
    assert_eq!(stage.backups(), (2, 2));
    stage.end(process);
}

#[test]
fn an_amount_of_wal_brings_the_next_one() {
    let Some(stage) = Stage::new() else { return };
    let process = stage.start("after 8MiB");
    stage.wait_settled(&process, 1);
    let next = process.facts.borrow().next.clone().expect("a next one");
    assert!(next.at.is_none() && next.because.starts_with("after 8MiB of WAL"), "{next:?}");
    stage.server.sql("create table t as select md5(i::text) from generate_series(1, 200000) i");
    stage.wait_settled(&process, 2);
    stage.end(process);
}

/// Between server and agent: the first connection that takes a base backup falls silent after its first megabyte.
fn proxy(port: u16, is_stuck: Arc<AtomicBool>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let own = listener.local_addr().expect("bound").port();
    thread::spawn(move || {
        for client in listener.incoming() {
            let Ok(client) = client else { return };
            let Ok(server) = TcpStream::connect(("127.0.0.1", port)) else { return };
            let is_backup = Arc::new(AtomicBool::new(false));
            let (up, down) = ((client.try_clone(), server.try_clone()), (server, client));
            let (Ok(from), Ok(to)) = up else { return };
            let asks = is_backup.clone();
            thread::spawn(move || {
                pump(from, to, |bytes, _| {
                    if bytes.windows(11).any(|window| window == b"BASE_BACKUP") {
                        asks.store(true, SeqCst);
                    }
                })
            });
            let is_stuck = is_stuck.clone();
            thread::spawn(move || {
                pump(down.0, down.1, |_, sent| {
                    while is_backup.load(SeqCst) && sent > 1 << 20 && is_stuck.load(SeqCst) {
                        thread::sleep(Duration::from_millis(50));
                    }
                })
            });
        }
    });
    own
}

fn pump(mut from: TcpStream, mut to: TcpStream, mut before: impl FnMut(&[u8], u64)) {
    let (mut buffer, mut sent) = (vec![0; 64 << 10], 0);
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        before(&buffer[..count], sent);
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
        sent += count as u64;
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}

#[test]
fn one_that_hangs_is_given_up_and_the_next_goes_through() {
    let Some(stage) = Stage::new() else { return };
    let is_stuck = Arc::new(AtomicBool::new(true));
    let port = proxy(stage.server.port(), is_stuck.clone());
    let conninfo = format!("host=127.0.0.1 port={port} user=postgres dbname=postgres sslmode=disable");
    let process = stage.start_on("0 2 * * *", &conninfo, Duration::from_secs(10));
    let failed = || stage.runtime.block_on(model::facts(&stage.store, FactKind::BackupFailed));
    let fact = crate::support::process::eventually(PATIENCE, "it is given up", || failed().into_iter().next());
    assert!(fact.cause.contains("the backup hung while copying: nothing moved for 10s"), "{fact:?}");
    is_stuck.store(false, SeqCst);
    stage.wait_settled(&process, 1);
    stage.end(process);
}
