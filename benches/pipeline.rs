//! Where a byte spends its time: proving it, encoding it, and the whole way from a server in memory to a store in
//! memory. `cargo bench --bench pipeline`; speed against other programs is `benches/compare`.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use jiff::Timestamp;
use seawall::agent::backup::{BackupSettings, HUNG_AFTER};
use seawall::agent::world::{ClusterOptions, Repository, World};
use seawall::agent::{Assignment, Fleet};
use seawall::archiver::Workers;
use seawall::backup::BackupOptions;
use seawall::codec::encrypt::Keys;
use seawall::codec::{Encoder, FRAME_BYTES, LEVEL_DEFAULT};
use seawall::config::ScheduleConfig;
use seawall::receiver::{Acknowledge, Clock};
use seawall::replication::SlotName;
use seawall::testkit::logins::ModelLogins;
use seawall::testkit::store::MemoryStore;
use seawall::testkit::wal_writer::WalWriter;
use seawall::testkit::walsender::ModelServer;
use seawall::wal::{Carry, History, Lsn, ScanOptions, Scanner, SegmentSize, SystemId, TimelineId};
use tokio_util::sync::CancellationToken;

const SYSTEM: SystemId = SystemId(7_000_000_000_000_000_001);
const START: Lsn = Lsn(16 << 20);
const MIB: usize = 1 << 20;

/// WAL shaped like a small transaction's: two changed blocks and a commit, again and again.
fn wal(bytes: usize) -> WalWriter {
    let mut writer = WalWriter::new(17, SYSTEM, SegmentSize::MIB_16, TimelineId(1), START);
    let time = Timestamp::from_second(1_767_225_600).expect("in range");
    let mut rng = fastrand::Rng::with_seed(1);
    let mut xid = 1000;
    while ((writer.flush_lsn() - START) as usize) < bytes {
        xid += 1;
        for relation in 0..3 {
            let row: Vec<u8> = (0..rng.usize(20..90)).map(|at| (at as u32 + xid) as u8).collect();
            writer.insert_block(xid, (1663, 5, 16384 + relation), rng.u32(0..9000), &row, &[1, 2, 3]);
        }
        writer.commit(xid, time);
    }
    writer
}

fn scan(criterion: &mut Criterion) {
    let writer = wal(32 * MIB);
    let bytes = writer.bytes(START..writer.flush_lsn());
    let options =
        ScanOptions { system_id: SYSTEM, segment_size: SegmentSize::MIB_16, history: History::root(TimelineId(1)) };
    let mut group = criterion.benchmark_group("scan");
    group.throughput(Throughput::Bytes(bytes.len() as u64));
    group.bench_function("small records, 128 KiB chunks", |bencher| {
        bencher.iter(|| {
            let mut scanner = Scanner::new(options.clone(), START, Carry::default());
            for chunk in bytes.chunks(128 << 10) {
                scanner.feed(scanner.position(), chunk).expect("the writer writes valid WAL");
                while scanner.poll_segment().is_some() {}
            }
            assert_eq!(scanner.proven(), writer.flush_lsn());
        });
    });
    // What cannot be saved: every byte goes through a CRC-32C once.
    group.bench_function("crc32c alone", |bencher| bencher.iter(|| crc32c::crc32c(bytes)));
    group.finish();
}

fn encode(criterion: &mut Criterion) {
    let writer = wal(32 * MIB);
    let bytes = writer.bytes(START..writer.flush_lsn());
    let mut group = criterion.benchmark_group("encode");
    group.throughput(Throughput::Bytes(bytes.len() as u64));
    group.bench_function("1 MiB frames with checksums", |bencher| {
        let mut encoder = Encoder::new(LEVEL_DEFAULT);
        bencher.iter(|| bytes.chunks(FRAME_BYTES).map(|frame| encoder.encode(frame).bytes.len()).sum::<usize>());
    });
    group.finish();
}

fn receive(criterion: &mut Criterion) {
    let mut writer = wal(64 * MIB);
    // The last segment is whole too: nothing waits for a tail.
    writer.switch();
    let server = ModelServer::new(SYSTEM, SegmentSize::MIB_16, START);
    server.with(|state| state.append(writer.bytes(START..writer.flush_lsn())));
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    let mut group = criterion.benchmark_group("receive");
    group.sample_size(10);
    group.throughput(Throughput::Bytes(writer.flush_lsn() - START));
    group.bench_function("from a server in memory to a store in memory", |bencher| {
        bencher.iter(|| {
            server.with(|state| state.slots.clear());
            let world = World {
                dialer: Arc::new(server.dialer()),
                logins: Arc::new(ModelLogins),
                repositories: vec![Repository { name: "memory".into(), backend: Arc::new(MemoryStore::default()) }],
                clock: Clock::system(),
                random: Arc::new(Mutex::new(fastrand::Rng::with_seed(1))),
                workers: Workers::threads(2),
            };
            // The archive begins with the segment of the server's position at that moment: let it be the first.
            server.with(|state| set_flush(state, START));
            let run = async {
                let stop = CancellationToken::new();
                let backups = BackupSettings {
                    automatic: false,
                    options: BackupOptions::default(),
                    from: None,
                    schedule: ScheduleConfig::default(),
                    hung_after: HUNG_AFTER,
                };
                let verify = Default::default();
                let assignment = Assignment { world, options: options(), backups, retention: None, verify };
                let agent = tokio::spawn(Fleet::new(vec![assignment], stop).run(Some(writer.flush_lsn())));
                while server.with(|state| state.sent.is_empty()) {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                server.with(|state| set_flush(state, writer.flush_lsn()));
                agent.await.expect("no panic").expect("the stream is archived");
            };
            runtime.block_on(run);
        });
    });
    group.finish();
}

fn set_flush(state: &mut seawall::testkit::walsender::ModelState, flush: Lsn) {
    state.wal.get_mut(&TimelineId(1)).expect("the first timeline").flush = flush;
}

fn options() -> ClusterOptions {
    ClusterOptions {
        name: "bench".into(),
        slot: SlotName::new("bench").expect("a valid name"),
        tail_interval: Duration::from_secs(5),
        shutdown_grace: Duration::from_secs(10),
        memory_bytes: 32 << 20,
        required: 1,
        acknowledge: Acknowledge::Repository,
        spool: None,
        synchronous: None,
        keys: Keys::default(),
        host: None,
    }
}

criterion_group!(benches, scan, encode, receive);
criterion_main!(benches);
