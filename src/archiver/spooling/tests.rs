use super::*;
use crate::codec::EncodedFrame;
use crate::spool::{RunName, Spool, SpoolOptions};

const SEGMENT_BYTES: u64 = 1 << 20;
const START: Lsn = Lsn(3 << 24);
const FRAME_STORED_BYTES: usize = 1000;
/// Three frames are half of it.
const MEMORY_BYTES: u64 = 6 * FRAME_STORED_BYTES as u64;

/// A stage at work, whose disk is real and whose threads are the test's own.
struct Stage {
    _directory: tempfile::TempDir,
    _spool: Spool,
    lineage: LineageSpool,
    input: mpsc::Sender<Encoded>,
    progress: Arc<watch::Sender<Progress>>,
    memory: MemoryBudget,
    _running: tokio_util::task::AbortOnDropHandle<()>,
}

impl Stage {
    fn start(acknowledge: Acknowledge) -> Stage {
        let directory = tempfile::tempdir().unwrap();
        let options = SpoolOptions { path: directory.path().join("spool"), limit_bytes: 1 << 30 };
        let spool = Spool::open(&options, "main").unwrap();
        let lineage = spool.lineage("7").unwrap();
        let memory = MemoryBudget::new(MEMORY_BYTES);
        let stored = Stored { record_end: START, bytes_end: START };
        let mut progress = Progress::new(START, vec![stored], 1, acknowledge, Lsn::ZERO);
        progress.handle_prefix_matched();
        progress.handle_received(START + (1 << 30), START + (1 << 30));
        let progress = Arc::new(watch::Sender::new(progress));
        let options = SpoolingOptions {
            timeline: TimelineId(1),
            segment_size: SegmentSize::new(SEGMENT_BYTES).unwrap(),
            memory: memory.clone(),
            acknowledge,
        };
        let health = Arc::new(watch::Sender::new(SpoolHealth::default()));
        let spooling = Spooling::new(options, lineage.clone(), Workers::inline(), progress.clone(), health);
        let (input, frames) = mpsc::channel(8);
        let running = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(spooling.run(frames)));
        Stage { _directory: directory, _spool: spool, lineage, input, progress, memory, _running: running }
    }

    /// A whole segment as one frame.
    async fn give(&self, index: u64) -> Arc<HeldFrame> {
        let bytes = bytes::Bytes::from(vec![index as u8; FRAME_STORED_BYTES]);
        let stored_crc32 = crc32fast::hash(&bytes);
        let frame = EncodedFrame { bytes, raw_bytes: SEGMENT_BYTES as usize, raw_crc32: 0, stored_crc32 };
        let frame = Arc::new(HeldFrame::new(START + index * SEGMENT_BYTES, frame, &self.memory));
        self.input.send(Encoded::Frame(frame.clone())).await.unwrap();
        frame
    }

    fn handle_stored(&self, segments: u64) {
        let end = START + segments * SEGMENT_BYTES;
        self.progress.send_modify(|progress| progress.handle_stored(0, Stored { record_end: end, bytes_end: end }));
    }

    fn files(&self) -> Vec<RunName> {
        self.lineage.runs().unwrap()
    }

    async fn wait_files(&self, count: usize) {
        let wait = async {
            while self.files().len() != count {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        let waited = tokio::time::timeout(Duration::from_secs(3600), wait).await;
        assert!(waited.is_ok(), "{count} files were expected, there are {:?}", self.files());
    }
}

/// In virtual time: an hour passes at once where nothing happens.
fn on_virtual_time(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    runtime.unwrap().block_on(test);
}

#[test]
fn nothing_stays_once_it_is_stored_however_many_segments_a_batch_held() {
    for acknowledge in [Acknowledge::Repository, Acknowledge::Spool] {
        on_virtual_time(async {
            let stage = Stage::start(acknowledge);
            let frames = [stage.give(0).await, stage.give(1).await, stage.give(2).await];
            match acknowledge {
                // Down to a quarter of the budget.
                Acknowledge::Repository => stage.wait_files(2).await,
                Acknowledge::Spool => stage.wait_files(3).await,
            }
            drop(frames);
            stage.handle_stored(3);
            stage.wait_files(0).await;
        });
    }
}

#[test]
fn a_file_that_is_read_while_it_becomes_superfluous_goes_afterwards_although_nothing_else_happens() {
    on_virtual_time(async {
        let stage = Stage::start(Acknowledge::Repository);
        let [first, second, third] = [stage.give(0).await, stage.give(1).await, stage.give(2).await];
        stage.wait_files(2).await;
        assert!(first.in_memory().is_none() && third.in_memory().is_some());
        drop((second, third));
        stage.handle_stored(3);
        stage.wait_files(1).await;
        assert_eq!(first.load().await.unwrap().len(), FRAME_STORED_BYTES, "whoever reads it is not disturbed");
        drop(first);
        stage.wait_files(0).await;
    });
}

#[test]
fn the_open_file_stays_until_its_whole_segment_is_stored() {
    on_virtual_time(async {
        let stage = Stage::start(Acknowledge::Spool);
        let frames = [stage.give(0).await, stage.give(1).await];
        stage.wait_files(2).await;
        drop(frames);
        stage.handle_stored(1);
        stage.wait_files(1).await;
        tokio::time::sleep(Duration::from_secs(3600)).await;
        assert_eq!(stage.files()[0].from, START + SEGMENT_BYTES);
    });
}
