//! The life of one cluster's agent: connect, find out where to go on, stream, and again, for ever.
//!
//! Owns: what follows from each way a session can begin and end; every attempt's reason is said.
//! Does not own: the steps themselves (`startup.rs`, `slot.rs`, `session.rs`, `standby.rs`).

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::absence::Absences;
use super::drain;
use super::known::{Beginning, Known};
use super::opening::{self, Opened, Opening};
use super::session::{self, Assignment, Member, Watched};
use super::slot::{self, Found};
use super::standby;
use super::startup::{self, Resumption, Server};
use super::world::{ClusterOptions, World};
use crate::archiver::ArchiveError;
use crate::catalog::contents::segment_span;
use crate::catalog::ledger::{FactKind, LedgerFact};
use crate::catalog::store::Archive;
use crate::error::{Disposition, ExitCode, Failure};
use crate::postgres::{Purpose, connect};
use crate::receiver::resume::Frontier;
use crate::receiver::{Acknowledge, ReceiveError, StreamEnd};
use crate::replication::{Connection, Start, StartFault};
use crate::repository::layout::{Epoch, Lineage};
use crate::spool::Spool;
use crate::telemetry::meters;
use crate::wal::{FaultClass, History, Lsn, ScanError, ScanOptions, SegmentSize, SystemId, TimelineId};

/// What a cluster's agent is doing, for whoever watches it.
#[derive(Clone, Debug, Default)]
pub struct Status {
    pub state: State,
    pub system_id: Option<SystemId>,
    pub timeline: Option<TimelineId>,
    pub watched: Option<Watched>,
    /// Why the last attempt failed, while there is no stream.
    pub failure: Option<Failure>,
    /// What is durable and was acknowledged, over all sessions.
    pub acknowledged: Lsn,
}

impl Status {
    /// What was watched stands still: it says nothing about the server any more.
    fn handle_stream_ended(&mut self) {
        self.state = State::Connecting;
        self.watched = None;
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum State {
    #[default]
    Connecting,
    Streaming,
    /// Another agent writes; this one takes over when it ends.
    Waiting,
    /// Nothing further is stored or acknowledged until an operator decides.
    Stopped,
}

/// One cluster's agent. [`ClusterAgent::run`] must not be dropped before it ends: cancel `stop` instead.
#[derive(Debug)]
pub struct ClusterAgent {
    world: World,
    options: ClusterOptions,
    stop: CancellationToken,
    status: watch::Sender<Status>,
    /// The epoch taken last, and where: a connection that comes and goes must not cost an object each time.
    epoch: Option<(Lineage, Epoch)>,
    /// Repositories that are out, over all streams.
    absences: Absences,
    /// What the streams before found out of the repositories.
    known: Known,
    /// Consecutive attempts without a stream.
    failures: u32,
    /// The fault the last stream ended with: the same one again is damage at the source.
    fault: Option<ScanError>,
    last_said: Option<String>,
    /// Where the server said, after it had granted the stream, that it no longer has the WAL.
    removed: Option<Removed>,
    /// Where it said so once: a standby that replaces a segment file may say so in passing.
    doubted: Option<Removed>,
    /// Until it has streamed or waited once, a refusal ends it.
    ends_when_refused: bool,
    spool: Option<Arc<Spool>>,
}

/// WAL that was asked for and is gone.
#[derive(Debug)]
struct Removed {
    timeline: TimelineId,
    segment_start: Lsn,
    cause: String,
}

/// What one round of connecting and streaming came to.
enum Round {
    /// Go on at once: the timeline ended, or a repository is back.
    Again,
    /// Connect anew; the stream had worked.
    Reconnect,
    Stopped,
}

impl ClusterAgent {
    const DELAY_MIN: Duration = Duration::from_millis(500);
    const DELAY_MAX: Duration = Duration::from_secs(30);

    pub fn new(
        world: World,
        options: ClusterOptions,
        stop: CancellationToken,
    ) -> (ClusterAgent, watch::Receiver<Status>) {
        let (status, watching) = watch::channel(Status::default());
        let agent = ClusterAgent {
            world,
            options,
            stop,
            status,
            epoch: None,
            absences: Absences::default(),
            known: Known::default(),
            failures: 0,
            fault: None,
            last_said: None,
            removed: None,
            doubted: None,
            ends_when_refused: false,
            spool: None,
        };
        (agent, watching)
    }

    /// Has it end when its configuration or its permissions are refused before it ever streamed: somebody is
    /// starting it and wants to know.
    pub fn ending_when_refused(mut self) -> ClusterAgent {
        self.ends_when_refused = true;
        self
    }

    /// Runs until told to stop, or until going on could damage the archive.
    pub async fn run(mut self) -> Result<(), Failure> {
        loop {
            let round = tokio::select! {
                biased;
                // Nothing of a stream is under way while connecting: dropping it loses nothing.
                () = self.stop.clone().cancelled_owned() => return Ok(()),
                prepared = self.drain_and_prepare() => prepared,
            };
            let round = match round {
                Ok(prepared) => {
                    let round = self.stream(prepared).await;
                    self.status.send_modify(Status::handle_stream_ended);
                    round
                }
                Err(failure) => Err(failure),
            };
            match round {
                Ok(Round::Stopped) => return Ok(()),
                Ok(Round::Again) => {
                    self.failures = 0;
                    continue;
                }
                Ok(Round::Reconnect) => self.failures = 0,
                Err(failure) if self.is_final(&failure) => {
                    meters::attempt_failed(&self.options.name, failure.exit_code.word());
                    self.status.send_modify(|status| {
                        status.state = State::Stopped;
                        status.failure = Some(failure.clone());
                    });
                    return Err(failure);
                }
                Err(failure) => self.say(failure),
            }
            if self.pause().await.is_err() {
                return Ok(());
            }
        }
    }

    /// What the spool still holds goes into the repository first: it may be what the server no longer has, and the
    /// stream begins with an empty spool. Needs no server.
    async fn drain_and_prepare(&mut self) -> Result<Prepared, Failure> {
        if self.spool.is_none() {
            self.spool = drain::open(&self.options).await?;
        }
        if let Some(spool) = &self.spool {
            self.epoch = drain::drain(&self.world, &self.options, spool, self.epoch.clone()).await?;
        }
        prepare(&self.world, &self.options, &self.absences, self.removed.take()).await
    }

    fn is_final(&self, failure: &Failure) -> bool {
        let is_refusal = matches!(failure.exit_code, ExitCode::Config | ExitCode::Permission);
        match failure.disposition {
            Disposition::Stop => true,
            Disposition::Operator => self.ends_when_refused && is_refusal,
            Disposition::Retry | Disposition::Reconnect => false,
        }
    }

    /// The same reason again is not said again, except every now and then.
    fn say(&mut self, failure: Failure) {
        const REPEAT_EVERY: u32 = 20;
        meters::attempt_failed(&self.options.name, failure.exit_code.word());
        let text = failure.to_string();
        if self.last_said.as_ref() != Some(&text) || self.failures.is_multiple_of(REPEAT_EVERY) {
            let hint = failure.hint.as_deref();
            tracing::warn!(cluster = self.options.name, attempt = self.failures + 1, hint, "{text}");
            self.last_said = Some(text);
        }
        self.status.send_modify(|status| {
            status.state = State::Connecting;
            status.watched = None;
            status.failure = Some(failure);
        });
    }

    /// Waits before the next attempt: 0.5 to 30 s, doubling, with jitter.
    async fn pause(&mut self) -> Result<(), ()> {
        let doubled = Self::DELAY_MIN.saturating_mul(1 << self.failures.min(10)).min(Self::DELAY_MAX);
        self.failures += 1;
        let jitter = self.world.random.lock().expect("no holder panics").f64() * 0.5 + 0.75;
        tokio::select! {
            biased;
            () = self.stop.cancelled() => Err(()),
            () = tokio::time::sleep(doubled.mul_f64(jitter)) => Ok(()),
        }
    }

    /// Streams, timeline after timeline, as long as the connection lasts.
    async fn stream(&mut self, prepared: Prepared) -> Result<Round, Failure> {
        let Prepared { connection, mut opening, server, start, seen, slot_restart, slot_cause, login } = prepared;
        let (timeline, segment_start) = (start.frontier.timeline, start.frontier.segment_start);
        let durable_before = start.frontier.stored().record_end;
        let lineage = opening.present[0].archive.lineage.clone();
        let planned: Vec<usize> = opening.present.iter().map(|opened| opened.index).collect();
        let held = self.held_epoch(&lineage);
        let turn = standby::take_or_wait(&self.world, &self.options, &mut opening, held, seen).await?;
        self.ends_when_refused = false;
        let epoch = match turn {
            standby::Turn::Ours { epoch, newcomers } => {
                if self.epoch.as_ref().is_none_or(|(before, _)| *before != lineage) {
                    self.known.forget_all();
                }
                self.known.forget(&newcomers);
                self.epoch = Some((lineage.clone(), epoch));
                epoch
            }
            standby::Turn::Theirs { writer, archive } => {
                self.status.send_modify(|status| status.state = State::Waiting);
                let (world, options, stop) = (&self.world, &self.options, &self.stop);
                return standby::wait(world, options, &mut opening, &archive, (connection, &server), writer, stop)
                    .await
                    .map(|()| if self.stop.is_cancelled() { Round::Stopped } else { Round::Reconnect });
            }
        };
        let archives: Vec<Archive> = opening.present.iter().map(|opened| opened.archive.clone()).collect();
        let members = self.members(&opening, &start, &planned, &server.history);
        let frontier = start.frontier;
        tracing::info!(
            cluster = self.options.name, server = %login.address, version = server.version, %timeline,
            from = %frontier.segment_start, durable = %frontier.stored().record_end, %epoch, "streaming"
        );
        let history = server.history.up_to(timeline).expect("the plan stays on the server's history");
        let scan = ScanOptions { system_id: server.identity.system_id, segment_size: server.segment_size, history };
        let wal_sender_timeout = server.wal_sender_timeout;
        let address = login.address.clone();
        let (server_major, system_id) = (server.major, server.identity.system_id);
        let spool = match &self.spool {
            Some(spool) => drain::begin(spool, &self.options, &members, epoch, &scan, server_major).await,
            None => None,
        };
        self.say_what_the_spool_lost(&frontier, slot_restart);
        let assignment = Assignment {
            frontier,
            members,
            absent: opening.absent,
            absences: self.absences.clone(),
            scan,
            path: server.history.clone(),
            slot_restart,
            epoch,
            wal_sender_timeout,
            server_major,
            address,
            spool,
        };
        let status = &self.status;
        meters::stream_began(&self.options.name);
        let watching = |watched: Watched| {
            status.send_modify(|status| {
                status.state = State::Streaming;
                status.system_id = Some(system_id);
                status.timeline = Some(timeline);
                status.watched = Some(watched);
                status.failure = None;
            });
        };
        let began = tokio::time::Instant::now();
        let ended = session::run(&self.world, &self.options, connection, assignment, self.stop.clone(), watching).await;
        self.remember_acknowledged();
        for (index, stored) in ended.contiguous {
            self.known.handle_contiguous(index, stored, &server.history);
        }
        for (index, others) in &ended.repaired {
            self.known.handle_compared(*index, timeline, others);
        }
        // One that ends as soon as it begins is a failure like others: with growing pauses, said once.
        if began.elapsed() >= Self::DELAY_MAX || self.status.borrow().acknowledged > durable_before {
            self.failures = 0;
            self.last_said = None;
        }
        let doubted = self.doubted.take();
        match ended.archived {
            Ok(()) | Err(ArchiveError::Stopped) => {}
            Err(error) => return Err(self.stop_for_conflict(&archives, timeline, server.segment_size, error).await),
        }
        match ended.received {
            Ok(StreamEnd::Timeline(end)) if !ended.has_stored && !self.stop.is_cancelled() => {
                let message = format!(
                    "timeline {timeline} ended at {}, and nothing could be stored of it from {segment_start} on",
                    end.next_start
                );
                // The plan would be the same again.
                Err(Failure::new(ExitCode::Unavailable, message).disposition(Disposition::Reconnect))
            }
            Ok(StreamEnd::Timeline(end)) => {
                tracing::info!(ended = %timeline, next = %end.next_timeline, at = %end.next_start, "the timeline ended");
                Ok(Round::Again)
            }
            // A repository is back: the next stream takes it in.
            Ok(StreamEnd::Stopped { .. }) if !self.stop.is_cancelled() => Ok(Round::Again),
            Ok(StreamEnd::Stopped { settled }) => {
                if !settled {
                    tracing::warn!("stopped before everything received was durable: the slot holds the rest");
                }
                Ok(Round::Stopped)
            }
            Ok(StreamEnd::ServerStopping) => {
                tracing::info!("the server is stopping");
                Ok(Round::Reconnect)
            }
            Err(ReceiveError::Scan(error)) => self.handle_fault(&archives, timeline, error).await,
            Err(ReceiveError::Replication(error)) if StartFault::of(&error) == Some(StartFault::SegmentRemoved) => {
                let is_here = |gone: &Removed| (gone.timeline, gone.segment_start) == (timeline, segment_start);
                match doubted.filter(is_here) {
                    // The first cause is the cause: by now the slot is a new one.
                    Some(gone) => self.removed = Some(gone),
                    None => self.doubted = Some(Removed { timeline, segment_start, cause: slot_cause }),
                }
                Err(error.into())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// With `acknowledge = "spool"` the slot may stand beyond what repository and spool hold together.
    fn say_what_the_spool_lost(&self, frontier: &Frontier, slot_restart: Lsn) {
        let held = frontier.stored().record_end;
        if self.options.acknowledge == Acknowledge::Spool && held > Lsn::ZERO && slot_restart > held {
            tracing::error!(
                cluster = self.options.name, timeline = %frontier.timeline, from = %held, to = %slot_restart,
                hint = "the spool was lost or damaged; where the server has removed this WAL the archive has a gap and \
                        needs a new base backup",
                "the server was told that WAL is durable which neither repository nor spool holds"
            );
        }
    }

    /// The epoch this process holds in this archive.
    fn held_epoch(&self, lineage: &Lineage) -> Option<Epoch> {
        self.epoch.as_ref().filter(|(held, _)| held == lineage).map(|(_, epoch)| *epoch)
    }

    /// The repositories of a stream. `planned` are those the start was planned with: one more may have failed since.
    fn members(&self, opening: &Opening, start: &Resumption, planned: &[usize], path: &History) -> Vec<Member> {
        for absent in &opening.absent {
            self.absences.handle_out(absent.index, &self.world.repositories[absent.index].name, &absent.why);
        }
        let is_lone = self.world.repositories.len() == 1;
        let present: Vec<usize> = opening.present.iter().map(|opened| opened.index).collect();
        let (timeline, segment_start) = (start.frontier.timeline, start.frontier.segment_start);
        let beginning = Beginning { path, timeline, segment_start, present: &present };
        let member = |opened: &Opened| {
            self.absences.handle_back(opened.index, &opened.name);
            let at = planned.iter().position(|index| *index == opened.index).expect("nobody joins after the plan");
            let (frontier, from) = (start.own[at].clone(), start.contiguous_from[at]);
            let contiguous = match is_lone {
                true => frontier.stored(),
                false => self.known.contiguous(opened.index, frontier.stored(), from, beginning),
            };
            let is_compared = !is_lone && self.known.is_to_compare(opened.index, from, beginning);
            Member { opened: opened.clone(), frontier, contiguous, is_compared }
        };
        opening.present.iter().map(member).collect()
    }

    fn remember_acknowledged(&self) {
        self.status.send_modify(|status| {
            if let Some(watched) = &status.watched {
                let acknowledged = watched.progress.borrow().acknowledged();
                status.acknowledged = status.acknowledged.max(acknowledged);
            }
        });
    }

    async fn stop_for_conflict(
        &self,
        archives: &[Archive],
        timeline: TimelineId,
        size: SegmentSize,
        error: ArchiveError,
    ) -> Failure {
        if let ArchiveError::Conflict { name, .. } = &error {
            let span = segment_span(*name, size).expect("named from a number");
            let fact = LedgerFact::new(FactKind::Conflict, self.world.clock.now(), error.to_string());
            let fact = fact.about(timeline, span.start, span.end);
            if let Err(failure) = startup::record_everywhere(&self.world, archives, fact).await {
                tracing::error!(%failure, "the conflict could not be written to the ledger");
            }
        }
        error.into()
    }

    /// A record that does not prove is asked for once more; the same fault with the same bytes again is damage
    /// at the source: kept as evidence, and the cluster stops.
    async fn handle_fault(
        &mut self,
        archives: &[Archive],
        timeline: TimelineId,
        error: ScanError,
    ) -> Result<Round, Failure> {
        let repeated = self.fault.as_ref() == Some(&error);
        self.fault = Some(error.clone());
        if !repeated {
            return Err(ReceiveError::Scan(error).into());
        }
        let message = format!("the server's WAL is damaged at its source: {error}");
        let failure = Failure::new(ExitCode::Data, message).disposition(Disposition::Stop);
        if error.class() == FaultClass::Identity {
            return Err(failure.hint("the bytes are another server's, or of a build seawall cannot read"));
        }
        let mut fact = LedgerFact::new(FactKind::CorruptAtSource, self.world.clock.now(), error.to_string()).about(
            timeline,
            error.record,
            error.lsn,
        );
        fact.details.insert("header".into(), error.detail.clone().into());
        startup::record_everywhere(&self.world, archives, fact).await?;
        Err(failure.hint(format!(
            "everything before {} is archived; check the server's disk and memory, take a base backup, then start \
             a new lineage: `seawall init --new-lineage`",
            error.record
        )))
    }
}

/// A connection on which START_REPLICATION was granted, and all that is known.
struct Prepared {
    connection: Connection,
    login: crate::replication::Login,
    opening: Opening,
    server: Server,
    start: Resumption,
    /// The highest epoch in which something was stored.
    seen: Epoch,
    slot_restart: Lsn,
    /// Why the slot might not hold what is asked for.
    slot_cause: String,
}

/// From nothing to a granted stream.
async fn prepare(
    world: &World,
    options: &ClusterOptions,
    absences: &Absences,
    removed: Option<Removed>,
) -> Result<Prepared, Failure> {
    let logins = world.logins.logins(Purpose::Physical)?;
    let connected = connect::connect_or_explain(world.dialer.as_ref(), &logins, world.logins.wanted()).await?;
    let connect::Connected { mut connection, login, in_recovery } = connected;
    let server = startup::introduce(&mut connection, in_recovery).await?;
    let found = slot::find(world, &mut connection, &login, &options.slot, &server).await?;
    let count = world.repositories.len();
    let skipped = |index| absences.skipped(index, count);
    let mut opening = opening::open(world, options, &server, found.presence(), skipped).await?;
    let asked = &server;
    opening.in_each(|opened| async move { startup::archive_histories(&opened.archive, asked).await }).await?;
    let held_from = match &found {
        Found::Usable { restart_lsn } => *restart_lsn,
        // Nothing is gone back for.
        Found::Absent | Found::Lost { .. } | Found::Unknown => Lsn::MAX,
    };
    let recent =
        opening.in_each(|opened| async move { startup::read_recent(&opened.archive, asked, held_from).await }).await?;
    let seen = recent.iter().map(startup::Recent::highest_epoch).max().unwrap_or_default();
    let start = startup::plan_start(&opening.file, &server, held_from, &recent)?;
    let archives: Vec<Archive> = opening.present.iter().map(|opened| opened.archive.clone()).collect();
    if let Some(lost) = start.lost {
        startup::record_fork(world, &archives, lost).await?;
    }
    let slot_cause = ensure_slot(&mut connection, options, &found).await?;
    let slot_restart = match &found {
        Found::Usable { restart_lsn } => Some(*restart_lsn),
        _ => slot::restart_lsn(world, &mut connection, &login, &options.slot, &server).await?,
    };
    let start = match removed {
        Some(gone)
            if (gone.timeline, gone.segment_start) == (start.frontier.timeline, start.frontier.segment_start) =>
        {
            let begin = slot_restart.unwrap_or(server.identity.flush_lsn);
            let frontier = skip_gap(world, &archives, &server, &start.frontier, begin, &gone.cause).await?;
            Resumption::anew(frontier, archives.len())
        }
        _ => start,
    };
    start_replication(&mut connection, options, &start.frontier).await?;
    let slot_restart = slot_restart.unwrap_or(Lsn::ZERO);
    Ok(Prepared { connection, login, opening, server, start, seen, slot_restart, slot_cause })
}

/// Creates the slot where it is missing or lost; says why the archive may have a gap.
async fn ensure_slot(connection: &mut Connection, options: &ClusterOptions, found: &Found) -> Result<String, Failure> {
    match found {
        Found::Usable { .. } => Ok("the server removed WAL the slot should have held".into()),
        Found::Absent | Found::Unknown => {
            slot::create(connection, &options.slot).await?;
            Ok(format!("slot {} did not exist on the server", options.slot))
        }
        Found::Lost { why } => {
            slot::replace(connection, &options.slot, why).await?;
            Ok(format!("slot {} was lost: {why}", options.slot))
        }
    }
}

async fn start_replication(
    connection: &mut Connection,
    options: &ClusterOptions,
    frontier: &Frontier,
) -> Result<(), Failure> {
    match connection.start_replication(&options.slot, frontier.segment_start, frontier.timeline).await? {
        Start::Streaming => Ok(()),
        // Exactly at its end: it ended after the plan was made.
        Start::TimelineEnded(_) => {
            let message = format!("timeline {} has just ended", frontier.timeline);
            Err(Failure::new(ExitCode::Unavailable, message).disposition(Disposition::Reconnect))
        }
    }
}

/// The WAL between the archive's end and `begin` is lost here: says so in the ledger and starts a new run.
async fn skip_gap(
    world: &World,
    archives: &[Archive],
    server: &Server,
    frontier: &Frontier,
    begin: Lsn,
    cause: &str,
) -> Result<Frontier, Failure> {
    let size = server.segment_size;
    let timeline = server.identity.timeline;
    let begin = size.floor(begin).max(size.end_of(size.segment_of(frontier.segment_start)));
    let mut from = frontier.stored().record_end.max(frontier.segment_start);
    let mut line = frontier.timeline;
    // A gap may reach over forks: one fact for each timeline it touches.
    loop {
        let to = server.history.end_of(line).unwrap_or(begin).min(begin);
        if from < to {
            tracing::error!(timeline = %line, %from, %to, cause, "the archive has a gap: this WAL is no longer on the server");
            let fact = LedgerFact::new(FactKind::Gap, world.clock.now(), cause).about(line, from, to);
            startup::record_everywhere(world, archives, fact).await?;
        }
        from = from.max(to);
        match server.history.child_of(line) {
            Some(child) if line != timeline => line = child,
            _ => break,
        }
    }
    Ok(Frontier::empty(timeline, begin))
}
