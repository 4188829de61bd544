//! One repository's place behind the encoding stage: it hands pieces to the archiver, and lets a repository go that
//! would hold up the others. Its frames are dropped, become its hole, and are copied there later (`repair.rs`).
//!
//! Owns: when a repository leaves a stream, and that this slows nobody down.
//! Does not own: how it comes back (`agent/absence.rs`), what is acknowledged meanwhile (`Progress`).

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use super::encode::Encoded;
use super::reach::Reach;
use super::writer::{ArchiveError, StoreHealth};
use super::{Archiver, ENCODED_MAX};
use crate::error::{ExitCode, Failure};
use crate::receiver::{MemoryBudget, Progress};
use crate::wal::{Lsn, SegmentSize};

/// How often an outlet that is behind is judged, while it is.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// A repository that is needed may stand still this long while memory is used up. Shorter: a short outage makes a
/// hole. Longer: the others wait longer for what the server writes meanwhile.
const PATIENCE: Duration = Duration::from_secs(5);

/// The repositories of one stream, as their outlets see one another. Clones share it.
#[derive(Clone, Debug)]
pub struct Outlets(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    members: Vec<Reach>,
    required: usize,
    progress: Arc<watch::Sender<Progress>>,
    /// Places in the configuration of the repositories that left, and why.
    gone: watch::Sender<Vec<(usize, Failure)>>,
    /// One decides at a time: the last one never leaves.
    deciding: Mutex<()>,
}

impl Outlets {
    pub fn new(members: Vec<Reach>, required: usize, progress: Arc<watch::Sender<Progress>>) -> Outlets {
        let gone = watch::Sender::new(Vec::new());
        Outlets(Arc::new(Shared { members, required, progress, gone, deciding: Mutex::new(()) }))
    }

    /// Who left, in the order they did.
    pub fn gone(&self) -> watch::Receiver<Vec<(usize, Failure)>> {
        self.0.gone.subscribe()
    }

    pub fn is_gone(&self, repository: usize) -> bool {
        self.0.gone.borrow().iter().any(|(gone, _)| *gone == repository)
    }

    /// Where the other repositories' runs end, of those that are still there.
    fn others(&self, repository: usize) -> Vec<Lsn> {
        let others = self.0.members.iter().filter(|reach| reach.repository != repository);
        others.filter(|reach| !self.is_gone(reach.repository)).map(|reach| reach.run().bytes_end).collect()
    }

    /// Takes a repository out of the stream; false when no other would be left.
    fn leave(&self, repository: usize, why: Failure) -> bool {
        let _deciding = self.0.deciding.lock().expect("no holder panics");
        if self.others(repository).is_empty() {
            return false;
        }
        self.0.progress.send_modify(|progress| progress.handle_awaited(repository, false));
        self.0.gone.send_modify(|gone| gone.push((repository, why)));
        true
    }
}

/// What became of a repository by the end of a stream that did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finished {
    /// It holds everything it was given.
    Stored,
    Left,
}

/// One repository's outlet. May be dropped at any await, as the archiver may.
#[derive(Debug)]
pub struct Outlet {
    name: String,
    input: mpsc::Receiver<Encoded>,
    archiver: AbortOnDropHandle<Result<(), ArchiveError>>,
    /// Closed when there is nothing more to come.
    pieces: Option<mpsc::Sender<Encoded>>,
    reach: Reach,
    health: StoreHealth,
    outlets: Outlets,
    memory: MemoryBudget,
    segment_size: SegmentSize,
    given: Given,
    /// What it could have stored by now: a frame alone is nothing yet.
    asked_to: Lsn,
    standing: Standing,
}

impl Outlet {
    pub fn new(
        name: String,
        archiver: Archiver,
        input: mpsc::Receiver<Encoded>,
        outlets: Outlets,
        health: StoreHealth,
    ) -> Outlet {
        let (reach, memory) = (archiver.reach.clone(), archiver.options.memory.clone());
        let segment_size = archiver.options.segment_size;
        let (pieces, pieces_input) = mpsc::channel(ENCODED_MAX);
        let archiver = AbortOnDropHandle::new(tokio::spawn(archiver.run(pieces_input)));
        let standing = Standing { position: reach.run().bytes_end, since: Instant::now() };
        Outlet {
            name,
            input,
            archiver,
            pieces: Some(pieces),
            reach,
            health,
            outlets,
            memory,
            segment_size,
            given: Given::default(),
            asked_to: Lsn::ZERO,
            standing,
        }
    }

    pub async fn run(mut self) -> Result<Finished, ArchiveError> {
        let mut look_at = Instant::now();
        let mut was_behind = false;
        loop {
            let stored_to = self.reach.run().bytes_end;
            self.given.trim(stored_to);
            let is_behind = self.asked_to > stored_to;
            if is_behind && !was_behind {
                look_at = Instant::now() + LOOK_INTERVAL;
                self.standing = Standing { position: stored_to, since: Instant::now() };
            }
            was_behind = is_behind;
            tokio::select! {
                biased;
                ended = &mut self.archiver => match ended.expect("the archiver does not panic") {
                    Ok(()) => return Ok(Finished::Stored),
                    Err(error) => return self.handle_failure(error).await,
                },
                encoded = self.input.recv(), if self.pieces.is_some() => match encoded {
                    Some(encoded) => self.hand_on(encoded).await,
                    None => self.pieces = None,
                },
                () = tokio::time::sleep_until(look_at), if is_behind && self.pieces.is_some() => {
                    look_at = Instant::now() + LOOK_INTERVAL;
                    if let Some(why) = self.judge()
                        && self.leave(why)
                    {
                        return self.discard().await;
                    }
                }
            }
        }
    }

    async fn hand_on(&mut self, encoded: Encoded) {
        match &encoded {
            Encoded::Frame(frame) => self.given.handle_frame(frame.end(), frame.stored_bytes),
            Encoded::Cut(cut) => self.asked_to = self.asked_to.max(cut.to),
            Encoded::Seal(sealed) => self.asked_to = self.asked_to.max(self.segment_size.end_of(sealed.number)),
        }
        let pieces = self.pieces.as_ref().expect("checked: there is more to come");
        // An archiver that ended says why itself.
        let _ = pieces.send(encoded).await;
    }

    /// Why this repository should be let go, if it should.
    fn judge(&mut self) -> Option<Failure> {
        let others = self.outlets.others(self.reach.repository);
        let ours = self.reach.run().bytes_end;
        let leader = others.iter().copied().max()?;
        let position = Position {
            is_exhausted: self.memory.is_exhausted(),
            held_alone_bytes: self.given.bytes_up_to(leader.min(self.asked_to)),
            limit_bytes: self.memory.limit_bytes(),
            ahead: others.iter().filter(|&&other| other > ours).count(),
            required: self.outlets.0.required,
            still: self.standing.look(ours),
        };
        should_leave(position).then(|| self.reason())
    }

    fn reason(&self) -> Failure {
        match self.health.failure() {
            Some(error) => error.into(),
            None => {
                let message = "it takes WAL slower than the server writes it, and others do not";
                Failure::new(ExitCode::Unavailable, message)
            }
        }
    }

    fn leave(&self, why: Failure) -> bool {
        let text = why.to_string();
        let hint = why.hint.clone();
        let left = self.outlets.leave(self.reach.repository, why);
        if left {
            tracing::warn!(
                repository = self.name, holds = %self.reach.run().bytes_end, hint,
                "the repository is left behind, others go on: {text}; what it misses is copied there when it is back"
            );
        }
        left
    }

    /// What stops the cluster stops it, whichever repository finds it; anything else concerns this repository only.
    async fn handle_failure(self, error: ArchiveError) -> Result<Finished, ArchiveError> {
        let concerns_all = match &error {
            ArchiveError::Stopped | ArchiveError::Fenced { .. } | ArchiveError::Conflict { .. } => true,
            ArchiveError::Incomparable { .. } => false,
            ArchiveError::Catalog(_) | ArchiveError::Store(_) | ArchiveError::Replaced { .. } => false,
        };
        match concerns_all || !self.leave(error.clone().into()) {
            true => Err(error),
            false => self.discard().await,
        }
    }

    /// Lets go of everything held and takes whatever comes, so that the encoding stage never waits.
    async fn discard(self) -> Result<Finished, ArchiveError> {
        let Outlet { mut input, archiver, pieces, .. } = self;
        drop((pieces, archiver));
        while input.recv().await.is_some() {}
        Ok(Finished::Left)
    }
}

/// Encoded bytes handed on and not known to be stored, by where they end.
#[derive(Debug, Default)]
struct Given(VecDeque<(Lsn, u64)>);

impl Given {
    fn handle_frame(&mut self, end: Lsn, stored_bytes: u64) {
        self.0.push_back((end, stored_bytes));
    }

    /// Forgets what is stored.
    fn trim(&mut self, stored_to: Lsn) {
        while self.0.front().is_some_and(|(end, _)| *end <= stored_to) {
            self.0.pop_front();
        }
    }

    fn bytes_up_to(&self, end: Lsn) -> u64 {
        self.0.iter().take_while(|(to, _)| *to <= end).map(|(_, bytes)| bytes).sum()
    }
}

/// How long a position has stood still.
#[derive(Debug)]
struct Standing {
    position: Lsn,
    since: Instant,
}

impl Standing {
    fn look(&mut self, position: Lsn) -> Duration {
        if position != self.position {
            *self = Standing { position, since: Instant::now() };
        }
        self.since.elapsed()
    }
}

/// A repository among the others, at one moment.
#[derive(Clone, Copy, Debug)]
struct Position {
    /// Reading pauses.
    is_exhausted: bool,
    /// In memory only because this one has not stored it.
    held_alone_bytes: u64,
    limit_bytes: u64,
    /// How many others have stored more.
    ahead: usize,
    required: usize,
    /// For how long it has stored nothing.
    still: Duration,
}

/// A repository leaves when it holds up the others: memory is used up, and mostly by what only this one has not stored.
/// One that is needed for what is acknowledged may be slow, and the stream with it, as the contract says, but not
/// stand still.
fn should_leave(position: Position) -> bool {
    let Position { is_exhausted, held_alone_bytes, limit_bytes, ahead, required, still } = position;
    let is_needed = ahead < required;
    is_exhausted && ahead > 0 && held_alone_bytes >= limit_bytes / 2 && (!is_needed || still >= PATIENCE)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEHIND: Position = Position {
        is_exhausted: true,
        held_alone_bytes: 60,
        limit_bytes: 100,
        ahead: 1,
        required: 1,
        still: Duration::ZERO,
    };

    #[test]
    fn a_repository_that_is_not_needed_never_holds_memory() {
        assert!(should_leave(BEHIND));
        assert!(!should_leave(Position { is_exhausted: false, ..BEHIND }));
        assert!(!should_leave(Position { held_alone_bytes: 40, ..BEHIND }), "the others have not stored it either");
    }

    #[test]
    fn one_that_is_needed_may_be_slow_but_not_stand_still() {
        let needed = Position { required: 2, ..BEHIND };
        assert!(!should_leave(needed));
        assert!(should_leave(Position { still: PATIENCE, ..needed }));
    }

    #[test]
    fn nobody_leaves_when_all_stand_still() {
        assert!(!should_leave(Position { ahead: 0, held_alone_bytes: 0, still: PATIENCE, ..BEHIND }));
    }

    #[test]
    fn bytes_are_held_alone_up_to_where_the_leader_is() {
        let mut given = Given::default();
        for (end, bytes) in [(10, 3), (20, 4), (30, 5)] {
            given.handle_frame(Lsn(end), bytes);
        }
        given.trim(Lsn(10));
        assert_eq!(given.bytes_up_to(Lsn(25)), 4);
        given.trim(Lsn(30));
        assert_eq!(given.bytes_up_to(Lsn(99)), 0);
    }
}
