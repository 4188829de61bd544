//! Owns: running BASE_BACKUP: what the server sends goes to the frames, is checked as it flows, and judged at the end.
//! Does not own: the order of a backup's objects (`mod.rs`), what is compared (`verdict`).

use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use super::frames::{Framer, Gone};
use super::inflate::Inflater;
use super::intake::{Intake, KeptFiles};
use super::verdict::{self, Bounds, ManifestCheck};
use super::{BackupError, BackupOptions, BackupPhase, BackupProgress, ConfigFile};
use crate::catalog::manifest::ManifestSummary;
use crate::replication::base_backup::{
    BackupDecoder, BackupEvent, BackupStart, BaseBackupOptions, Checkpoint, TablespaceRow,
};
use crate::replication::{BackupWord, Connection, ServerError};
use crate::repository::layout::TarStream;
use crate::wal::{Lsn, SystemId, TimelineId};

/// A server that is asked for a checkpoint at once has this long, however busy its disk is.
const FAST_CHECKPOINT_MAX: Duration = Duration::from_secs(3600);
/// One day is the longest `checkpoint_timeout`.
const SPREAD_CHECKPOINT_MAX: Duration = Duration::from_secs(25 * 3600);
/// While files flow: the slowest disk gives something in this time. A vanished peer is noticed earlier, by TCP.
const SILENCE_MAX: Duration = Duration::from_secs(600);
/// Warnings kept for the message of a failed backup.
const WARNINGS_KEPT: usize = 10;
const PROGRESS_INTERVAL: Duration = Duration::from_millis(500);

/// What is known of the server before it is asked.
#[derive(Clone, Debug)]
pub struct SourceFacts {
    pub system_id: SystemId,
    pub timeline: TimelineId,
    pub major: u32,
    pub label: String,
    pub slot_restart_lsn: Lsn,
}

/// What came, all of it, and right.
#[derive(Debug)]
pub struct Received {
    pub timeline: TimelineId,
    pub start: Lsn,
    pub stop: Lsn,
    pub from_standby: bool,
    pub streams: Vec<TablespaceRow>,
    pub manifest: ManifestSummary,
}

/// Why it did not.
#[derive(Debug)]
pub enum ReceiveError {
    Failed(BackupError),
    /// No store takes it any more.
    Gone,
}

impl From<BackupError> for ReceiveError {
    fn from(error: BackupError) -> ReceiveError {
        ReceiveError::Failed(error)
    }
}

impl From<Gone> for ReceiveError {
    fn from(_: Gone) -> ReceiveError {
        ReceiveError::Gone
    }
}

/// Runs the whole command.
pub async fn receive(
    connection: &mut Connection,
    facts: &SourceFacts,
    options: &BackupOptions,
    config: Vec<ConfigFile>,
    framer: Framer,
    progress: &watch::Sender<BackupProgress>,
    stop: &CancellationToken,
) -> Result<Received, ReceiveError> {
    let asked = BaseBackupOptions {
        label: facts.label.clone(),
        checkpoint: options.checkpoint,
        max_rate_kib: options.max_rate_kib,
        manifest_checksums: options.checksums.name(),
        compression: options.compression,
    };
    let command = asked.command(facts.major).map_err(BackupError::from)?;
    let mut reception = Reception {
        facts,
        options,
        framer,
        content: Content::Files(Box::new(Intake::new(options.checksums, options.volume_bytes, facts.major >= 15))),
        inflater: None,
        start: None,
        in_stream: None,
        end: None,
        warnings: Vec::new(),
        meter: Meter::new(progress.clone()),
    };
    let ran = reception.run(connection, &command, stop).await;
    if let Err(ReceiveError::Failed(BackupError::Source(error))) = &ran
        && error.sqlstate() == Some("55000")
        && reception.start.is_some()
    {
        // It has several reasons for that state in the middle of a backup; a promotion shows in the timeline.
        let identity = connection.identify_system().await;
        if identity.is_ok_and(|identity| identity.timeline != facts.timeline) {
            return Err(BackupError::Promoted.into());
        }
    }
    ran?;
    let (received, framer) = reception.judge()?;
    framer.finish(config).await?;
    Ok(received)
}

/// First files, then the manifest that lists them.
#[derive(Debug)]
enum Content {
    Files(Box<Intake>),
    Manifest(Box<ManifestCheck>, KeptFiles),
    /// Only while one becomes the other.
    Nothing,
}

#[derive(Debug)]
struct Reception<'a> {
    facts: &'a SourceFacts,
    options: &'a BackupOptions,
    framer: Framer,
    content: Content,
    /// Of the stream being read, where the server compresses.
    inflater: Option<Inflater>,
    start: Option<BackupStart>,
    in_stream: Option<usize>,
    end: Option<(Lsn, TimelineId)>,
    warnings: Vec<String>,
    meter: Meter,
}

impl Reception<'_> {
    async fn run(
        &mut self,
        connection: &mut Connection,
        command: &str,
        stop: &CancellationToken,
    ) -> Result<(), ReceiveError> {
        let method = self.options.compression.map(|compression| compression.method);
        let mut decoder = BackupDecoder::new(self.facts.major, method);
        connection.start_base_backup(command).await.map_err(|error| BackupError::of_source(error, &[]))?;
        self.meter.phase(BackupPhase::Checkpoint);
        while !self.run_received(connection, &mut decoder).await? {
            let patience = self.patience();
            let filled = tokio::select! {
                biased;
                () = stop.cancelled() => return Err(BackupError::Stopped.into()),
                filled = timeout(patience, connection.fill_base_backup()) => filled,
            };
            filled
                .map_err(|_| BackupError::Silent(patience))?
                .map_err(|error| BackupError::of_source(error, &self.warnings))?;
        }
        Ok(())
    }

    fn patience(&self) -> Duration {
        match (&self.start, self.options.checkpoint) {
            (Some(_), _) => SILENCE_MAX,
            (None, Checkpoint::Fast) => FAST_CHECKPOINT_MAX,
            (None, Checkpoint::Spread) => SPREAD_CHECKPOINT_MAX,
        }
    }

    /// Deals with everything that was received; true when the command is complete.
    async fn run_received(
        &mut self,
        connection: &mut Connection,
        decoder: &mut BackupDecoder,
    ) -> Result<bool, ReceiveError> {
        loop {
            let word = connection.next_of_base_backup(decoder);
            match word.map_err(|error| BackupError::of_source(error, &self.warnings))? {
                None => return Ok(false),
                Some(BackupWord::Notice(notice)) => self.handle_notice(*notice),
                Some(BackupWord::Event(BackupEvent::Complete)) => return Ok(true),
                Some(BackupWord::Event(event)) => self.handle(event).await?,
            }
        }
    }

    fn handle_notice(&mut self, notice: ServerError) {
        tracing::warn!(severity = notice.severity, "the server says during the base backup: {notice}");
        if notice.severity == "WARNING" && self.warnings.len() < WARNINGS_KEPT {
            self.warnings.push(notice.message);
        }
    }

    async fn handle(&mut self, event: BackupEvent<'_>) -> Result<(), ReceiveError> {
        match event {
            BackupEvent::Aside | BackupEvent::Complete => {}
            BackupEvent::Start(start) => self.begin(start)?,
            BackupEvent::Archive(index) => {
                self.end_stream().await?;
                self.begin_stream(index).await?;
            }
            BackupEvent::Data(bytes) if self.options.compression.is_some() => self.take_compressed(bytes).await?,
            BackupEvent::Data(bytes) => self.take(bytes).await?,
            BackupEvent::ManifestBegins => {
                self.end_stream().await?;
                let Content::Files(intake) = std::mem::replace(&mut self.content, Content::Nothing) else {
                    unreachable!("the decoder lets one manifest through")
                };
                let (files, kept) = intake.finish();
                self.content = Content::Manifest(ManifestCheck::new(files, self.options.checksums).into(), kept);
            }
            BackupEvent::Manifest(bytes) => {
                let Content::Manifest(check, _) = &mut self.content else {
                    unreachable!("the decoder announces the manifest")
                };
                check.push(bytes)?;
                self.framer.manifest(bytes).await?;
            }
            BackupEvent::End { stop, timeline } => {
                self.framer.end_manifest().await?;
                self.end = Some((stop, timeline));
            }
        }
        Ok(())
    }

    fn begin(&mut self, start: BackupStart) -> Result<(), BackupError> {
        let held = self.facts.slot_restart_lsn;
        if start.lsn < held {
            return Err(BackupError::BeforeSlot { start: start.lsn, held });
        }
        if start.timeline != self.facts.timeline {
            return Err(BackupError::TimelineChanged { start: self.facts.timeline, stop: start.timeline });
        }
        tracing::info!(start = %start.lsn, timeline = %start.timeline, "the base backup begins");
        self.meter.begin(&start);
        self.start = Some(start);
        Ok(())
    }

    async fn begin_stream(&mut self, index: usize) -> Result<(), ReceiveError> {
        let streams = &self.start.as_ref().expect("the decoder lets archives follow the start").streams;
        let stream = match &streams[index].tablespace {
            None => TarStream::Base,
            Some(tablespace) => TarStream::Tablespace(tablespace.oid),
        };
        let Content::Files(intake) = &mut self.content else { unreachable!("archives come before the manifest") };
        intake.begin_stream(stream);
        self.in_stream = Some(index);
        self.inflater = self.options.compression.map(|compression| Inflater::new(compression.method));
        self.framer.begin_stream(stream).await?;
        Ok(())
    }

    /// Takes raw bytes of the stream being read.
    async fn take(&mut self, mut bytes: &[u8]) -> Result<(), ReceiveError> {
        let count = bytes.len() as u64;
        let Content::Files(intake) = &mut self.content else { unreachable!("archives come before the manifest") };
        while let Some(portion) = intake.next(&mut bytes)? {
            self.framer.take(portion).await?;
        }
        self.meter.count(count, self.framer.volumes);
        Ok(())
    }

    async fn take_compressed(&mut self, bytes: &[u8]) -> Result<(), ReceiveError> {
        let mut piece = Some(Bytes::copy_from_slice(bytes));
        while piece.is_some() {
            let inflater = self.inflater.as_mut().expect("a stream has one where the server compresses");
            if let Some(raw) = inflater.push(&mut piece).await? {
                self.take(&raw).await?;
            }
        }
        Ok(())
    }

    async fn end_stream(&mut self) -> Result<(), ReceiveError> {
        if self.in_stream.take().is_none() {
            return Ok(());
        }
        if let Some(mut inflater) = self.inflater.take() {
            while let Some(raw) = inflater.rest().await? {
                self.take(&raw).await?;
            }
        }
        let Content::Files(intake) = &mut self.content else { unreachable!("archives come before the manifest") };
        let end = intake.end_stream()?;
        self.framer.end_volume(end).await?;
        self.meter.end_stream();
        Ok(())
    }

    /// The server has said that all is well: whether that is so.
    fn judge(self) -> Result<(Received, Framer), BackupError> {
        let (Some(start), Some((stop, timeline)), Content::Manifest(check, kept)) =
            (self.start, self.end, self.content)
        else {
            unreachable!("the decoder says it is complete after start, manifest and end")
        };
        if timeline != start.timeline {
            return Err(BackupError::TimelineChanged { start: start.timeline, stop: timeline });
        }
        let manifest = check.finish()?;
        let bounds = Bounds { system_id: self.facts.system_id, timeline, start: start.lsn, stop };
        let from_standby = verdict::agree(&bounds, &self.facts.label, &kept, &manifest)?;
        self.meter.end(stop);
        let (start, streams) = (start.lsn, start.streams);
        Ok((Received { timeline, start, stop, from_standby, streams, manifest }, self.framer))
    }
}

/// Counts, and says so now and then.
#[derive(Debug)]
struct Meter {
    progress: watch::Sender<BackupProgress>,
    raw_bytes: u64,
    said_at: Instant,
    said_bytes: u64,
}

impl Meter {
    fn new(progress: watch::Sender<BackupProgress>) -> Meter {
        Meter { progress, raw_bytes: 0, said_at: Instant::now(), said_bytes: 0 }
    }

    fn phase(&self, phase: BackupPhase) {
        self.progress.send_modify(|progress| progress.phase = phase);
    }

    fn begin(&mut self, start: &BackupStart) {
        self.said_at = Instant::now();
        self.progress.send_modify(|progress| {
            progress.phase = BackupPhase::Copying;
            progress.timeline = Some(start.timeline);
            progress.start_lsn = Some(start.lsn);
            progress.raw_bytes_expected = start.streams.iter().map(|row| row.bytes).sum();
            progress.streams = start.streams.len() as u32;
        });
    }

    fn count(&mut self, bytes: u64, volumes: u32) {
        self.raw_bytes += bytes;
        let elapsed = self.said_at.elapsed();
        if elapsed < PROGRESS_INTERVAL {
            return;
        }
        let latest = (self.raw_bytes - self.said_bytes) as f64 / elapsed.as_secs_f64();
        (self.said_at, self.said_bytes) = (Instant::now(), self.raw_bytes);
        self.progress.send_modify(|progress| {
            progress.raw_bytes = self.raw_bytes;
            progress.volumes = volumes;
            // Smoothed: a third of it is what was just seen.
            let smoothed = progress.bytes_per_second.map_or(latest, |before| before as f64 * 0.7 + latest * 0.3);
            progress.bytes_per_second = Some(smoothed as u64);
        });
    }

    fn end_stream(&self) {
        self.progress.send_modify(|progress| progress.streams_done += 1);
    }

    fn end(&self, stop: Lsn) {
        self.progress.send_modify(|progress| {
            progress.raw_bytes = self.raw_bytes;
            progress.stop_lsn = Some(stop);
        });
    }
}
