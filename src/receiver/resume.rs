//! Owns: where streaming starts (a pure plan from what the archive holds and what the server says), and the
//! comparison of the prefix a server repeats with what is stored.
//! Does not own: reading the archive, asking the server, carrying the plan out. Pure.

use crate::error::{Advice, Disposition, ExitCode};
use crate::receiver::progress::Stored;
use crate::repository::layout::TailName;
use crate::wal::{Carry, History, Lsn, SegmentSize, TimelineId};

/// The end of what the archive holds of one timeline, contiguously.
#[derive(Clone, Debug, PartialEq)]
pub struct Frontier {
    pub timeline: TimelineId,
    /// Start of the segment the frontier lies in: everything below is sealed and indexed.
    pub segment_start: Lsn,
    /// The scanner's state there; the default when nothing before it is known.
    pub carry: Carry,
    /// Last record end at or before `segment_start`, as the index has it.
    pub record_end: Lsn,
    /// Tails of the unfinished segment, contiguous from `segment_start`.
    pub tails: Vec<TailName>,
}

impl Frontier {
    /// A line with nothing stored yet, to be streamed from `segment_start`.
    pub fn empty(timeline: TimelineId, segment_start: Lsn) -> Frontier {
        Frontier { timeline, segment_start, carry: Carry::default(), record_end: Lsn::ZERO, tails: Vec::new() }
    }

    pub fn stored(&self) -> Stored {
        match self.tails.iter().map(|tail| tail.to).max() {
            Some(end) => Stored { record_end: end, bytes_end: end },
            None => Stored { record_end: self.record_end, bytes_end: self.segment_start },
        }
    }
}

/// What the connected server says about itself.
#[derive(Clone, Debug)]
pub struct ServerPosition {
    pub history: History,
    pub flush_lsn: Lsn,
    pub in_recovery: bool,
}

/// What to do next on this connection.
#[derive(Clone, Debug, PartialEq)]
pub enum Plan {
    /// Stream `timeline` on, from the frontier's segment.
    Continue(Frontier),
    /// The archive holds its parent up to the fork (or beyond): start the child in the fork's segment.
    /// `parent.segment_start` is the start of that segment, `lost` the parent's WAL beyond the fork.
    Branch { child: TimelineId, fork: Lsn, parent: TimelineId, lost: Option<(Lsn, Lsn)> },
    /// The archive holds nothing on this server's history.
    Begin,
}

/// Why this server must not be streamed from.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error(
        "the server is on timeline {server}, the archive already follows timeline {archived}, which is not in the server's history"
    )]
    Demoted { server: TimelineId, archived: TimelineId },
    #[error("the archive holds timeline {timeline} up to {archived}, the server has only written {server}")]
    BehindArchive { timeline: TimelineId, archived: Lsn, server: Lsn },
    #[error("the standby has received {server} of timeline {timeline}, the archive already holds {archived}")]
    StandbyLags { timeline: TimelineId, archived: Lsn, server: Lsn },
}

impl Advice for Refusal {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Refusal::Demoted { .. } => "this looks like a former primary: point `postgres` at the promoted server, or list all hosts with target_session_attrs=read-write".into(),
            Refusal::BehindArchive { .. } => "was the server restored from an older copy, or reset with pg_resetwal? If this is intended, continue in a new lineage: `seawall init --new-lineage`".into(),
            Refusal::StandbyLags { .. } => "the agent waits until the standby has caught up".into(),
        })
    }

    fn disposition(&self) -> Disposition {
        match self {
            Refusal::StandbyLags { .. } => Disposition::Reconnect,
            Refusal::Demoted { .. } | Refusal::BehindArchive { .. } => Disposition::Operator,
        }
    }

    fn exit_code(&self) -> ExitCode {
        match self {
            Refusal::StandbyLags { .. } => ExitCode::Unavailable,
            _ => ExitCode::Data,
        }
    }
}

/// Decides where to go on. `frontiers` holds one entry for every timeline the archive has WAL of.
pub fn plan(server: &ServerPosition, frontiers: &[Frontier]) -> Result<Plan, Refusal> {
    let server_timeline = server.history.timeline;
    let newest = frontiers.iter().map(|frontier| frontier.timeline).max();
    if let Some(archived) = newest.filter(|&newest| newest > server_timeline) {
        return Err(Refusal::Demoted { server: server_timeline, archived });
    }
    let on_path = frontiers.iter().filter(|frontier| server.history.contains(frontier.timeline));
    let Some(frontier) = on_path.max_by_key(|frontier| frontier.timeline) else {
        return Ok(Plan::Begin);
    };
    let archived = frontier.stored().bytes_end;
    let timeline = frontier.timeline;
    match (server.history.end_of(timeline), server.history.child_of(timeline)) {
        (Some(fork), Some(child)) if archived >= fork => {
            let lost = (archived > fork).then_some((fork, archived));
            Ok(Plan::Branch { child, fork, parent: timeline, lost })
        }
        (Some(_), _) => Ok(Plan::Continue(frontier.clone())),
        (None, _) if archived <= server.flush_lsn => Ok(Plan::Continue(frontier.clone())),
        (None, _) if server.in_recovery => Err(Refusal::StandbyLags { timeline, archived, server: server.flush_lsn }),
        (None, _) => Err(Refusal::BehindArchive { timeline, archived, server: server.flush_lsn }),
    }
}

/// The frontier a child timeline starts from: the fork's segment, whose first bytes repeat the parent's.
/// `carry` and `record_end` are the parent's at that segment's start.
pub fn child_frontier(child: TimelineId, fork: Lsn, size: SegmentSize, carry: Carry, record_end: Lsn) -> Frontier {
    Frontier { timeline: child, segment_start: size.floor(fork), carry, record_end, tails: Vec::new() }
}

/// Passes over timelines that end before a stream from `frontier` on could add anything of theirs to the archive: it
/// would be asked for again and again. What is held already reaches to `held_to`. Such a timeline ends there (a server
/// that crashed in its promotion leaves one without a record), or in the frontier's segment while nothing before that is
/// known: then a record that crosses the segment's start may be all of it, and nobody could prove it. The child's own
/// first segment repeats those bytes.
pub fn passing_empty(frontier: Frontier, held_to: Lsn, path: &History, size: SegmentSize) -> Frontier {
    let start = frontier.segment_start;
    let Frontier { carry, tails, .. } = &frontier;
    let is_unknown = carry.last_record.is_none() && carry.pending.is_none() && tails.is_empty() && held_to == start;
    let is_empty = |end: Lsn| end <= held_to || is_unknown && size.floor(end) <= start;
    let mut timeline = frontier.timeline;
    while let (Some(end), Some(child)) = (path.end_of(timeline), path.child_of(timeline))
        && is_empty(end)
    {
        timeline = child;
    }
    Frontier { timeline, ..frontier }
}

/// The server's bytes differ from what is stored under the same positions: another history of the same name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the server's WAL differs from the archive's in [{from}, {to}): CRC-32 {found:08x} received, {stored:08x} stored"
)]
pub struct Divergence {
    pub from: Lsn,
    pub to: Lsn,
    pub stored: u32,
    pub found: u32,
}

impl Advice for Divergence {
    fn hint(&self) -> Option<String> {
        Some("is this a clone, a restored copy, or a server that lost writes (fsync=off)? Nothing was stored or acknowledged; to keep both histories, continue with `seawall init --new-lineage`".into())
    }
    fn disposition(&self) -> Disposition {
        Disposition::Stop
    }
    fn exit_code(&self) -> ExitCode {
        ExitCode::Data
    }
}

/// Compares the stream, as it comes, with the CRCs in the names of stored tails.
#[derive(Debug)]
pub struct PrefixCheck {
    open: Vec<(TailName, crc32fast::Hasher)>,
}

impl PrefixCheck {
    pub fn new(tails: &[TailName]) -> PrefixCheck {
        PrefixCheck { open: tails.iter().map(|tail| (*tail, crc32fast::Hasher::new())).collect() }
    }

    pub fn is_done(&self) -> bool {
        self.open.is_empty()
    }

    /// Takes the next bytes of the stream, which starts at or before the first tail.
    pub fn observe(&mut self, lsn: Lsn, bytes: &[u8]) -> Result<(), Divergence> {
        let end = lsn + bytes.len() as u64;
        for (tail, hasher) in &mut self.open {
            let from = tail.from.max(lsn);
            let to = tail.to.min(end);
            if from < to {
                hasher.update(&bytes[(from - lsn) as usize..(to - lsn) as usize]);
            }
        }
        while let Some(at) = self.open.iter().position(|(tail, _)| tail.to <= end) {
            let (tail, hasher) = self.open.swap_remove(at);
            let found = hasher.finalize();
            if found != tail.raw_crc32 {
                return Err(Divergence { from: tail.from, to: tail.to, stored: tail.raw_crc32, found });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::Form;
    use crate::repository::layout::Epoch;

    const MIB: u64 = 1 << 20;

    fn tail(from: u64, to: u64, raw_crc32: u32) -> TailName {
        TailName { epoch: Epoch(1), from: Lsn(from), to: Lsn(to), raw_crc32, last_commit: None, form: Form::Plain }
    }

    fn frontier(timeline: u32, segment_start: u64, end: u64) -> Frontier {
        let mut frontier = Frontier::empty(TimelineId(timeline), Lsn(segment_start));
        if end > segment_start {
            frontier.tails.push(tail(segment_start, end, 0));
        }
        frontier
    }

    fn server(timeline: u32, history: &str, flush: u64) -> ServerPosition {
        let history = History::parse(TimelineId(timeline), history.as_bytes()).unwrap();
        ServerPosition { history, flush_lsn: Lsn(flush), in_recovery: false }
    }

    #[test]
    fn the_same_timeline_goes_on_from_the_frontier() {
        let at = frontier(1, 3 * MIB, 3 * MIB + 800);
        assert_eq!(plan(&server(1, "", 4 * MIB), std::slice::from_ref(&at)), Ok(Plan::Continue(at)));
    }

    #[test]
    fn an_empty_archive_begins() {
        assert_eq!(plan(&server(1, "", 4 * MIB), &[]), Ok(Plan::Begin));
    }

    #[test]
    fn after_a_promotion_the_parent_is_filled_up_to_the_fork_first() {
        let at = frontier(1, 3 * MIB, 3 * MIB + 800);
        let promoted = server(2, "1 0/380000 x\n", 5 * MIB);
        assert_eq!(plan(&promoted, std::slice::from_ref(&at)), Ok(Plan::Continue(at)));
    }

    #[test]
    fn at_the_fork_the_child_follows_even_when_its_number_is_skipped() {
        let at = frontier(1, 3 * MIB, 0x38_0000);
        let promoted = server(4, "1 0/380000 x\n3 0/390000 y\n", 5 * MIB);
        let expected = Plan::Branch { child: TimelineId(3), fork: Lsn(0x38_0000), parent: TimelineId(1), lost: None };
        assert_eq!(plan(&promoted, &[at]), Ok(expected));
    }

    #[test]
    fn wal_beyond_the_fork_is_named_as_lost() {
        let at = frontier(1, 4 * MIB, 4 * MIB + 96);
        let promoted = server(2, "1 0/380000 x\n", 5 * MIB);
        let Ok(Plan::Branch { lost, .. }) = plan(&promoted, &[at]) else { panic!() };
        assert_eq!(lost, Some((Lsn(0x38_0000), Lsn(4 * MIB + 96))));
    }

    #[test]
    fn a_demoted_primary_is_refused() {
        let lines = [frontier(1, 3 * MIB, 0x38_0000), frontier(2, 3 * MIB, 0x39_0000)];
        let refused = plan(&server(1, "", 9 * MIB), &lines);
        assert_eq!(refused, Err(Refusal::Demoted { server: TimelineId(1), archived: TimelineId(2) }));
    }

    #[test]
    fn a_server_behind_the_archive_is_refused_and_a_lagging_standby_waited_for() {
        let lines = [frontier(1, 3 * MIB, 3 * MIB + 800)];
        let mut behind = server(1, "", 3 * MIB + 700);
        assert!(matches!(plan(&behind, &lines), Err(Refusal::BehindArchive { .. })));
        behind.in_recovery = true;
        assert_eq!(plan(&behind, &lines).unwrap_err().disposition(), Disposition::Reconnect);
    }

    #[test]
    fn an_abandoned_sibling_does_not_matter() {
        let lines = [frontier(1, 3 * MIB, 0x38_0000), frontier(2, 3 * MIB, 0x39_0000)];
        let restored = server(3, "1 0/340000 pitr\n", 9 * MIB);
        let Ok(Plan::Branch { child, lost, .. }) = plan(&restored, &lines) else { panic!() };
        assert_eq!((child, lost), (TimelineId(3), Some((Lsn(0x34_0000), Lsn(0x38_0000)))));
    }

    #[test]
    fn a_timeline_of_which_nothing_could_be_stored_is_passed_over() {
        let size = SegmentSize::new(MIB).unwrap();
        let passed = |frontier: Frontier, held_to: u64, history: &str, timeline: u32| {
            let path = History::parse(TimelineId(timeline), history.as_bytes()).unwrap();
            passing_empty(frontier, Lsn(held_to), &path, size).timeline.0
        };
        let unknown = frontier(1, 3 * MIB, 0);
        assert_eq!(passed(unknown.clone(), 3 * MIB, "1 0/380000 x\n", 2), 2);
        assert_eq!(passed(unknown.clone(), 3 * MIB, "1 0/400000 x\n", 2), 1, "its first segment is whole");
        assert_eq!(passed(unknown.clone(), 3 * MIB, "1 0/380000 x\n2 0/390000 x\n", 3), 3);
        assert_eq!(passed(unknown, 3 * MIB, "", 1), 1);
        // With a record known before it, or in it, the rest of it can be proven.
        let mut known = frontier(1, 3 * MIB, 0);
        known.carry.last_record = Some(Lsn(3 * MIB - 64));
        assert_eq!(passed(known, 3 * MIB, "1 0/380000 x\n", 2), 1);
        assert_eq!(passed(frontier(1, 3 * MIB, 3 * MIB + 800), 3 * MIB, "1 0/380000 x\n", 2), 1);
        // Timeline 2 was begun and left at the same place: in a segment, and at its start.
        assert_eq!(passed(frontier(2, 3 * MIB, 0), 0x38_0000, "1 0/380000 x\n2 0/380000 x\n", 3), 3);
        assert_eq!(passed(frontier(2, 3 * MIB, 0), 0x38_0000, "1 0/380000 x\n2 0/380060 x\n", 3), 2);
        assert_eq!(passed(frontier(2, 3 * MIB, 0), 3 * MIB, "1 0/300000 x\n2 0/300000 x\n", 3), 3);
    }

    #[test]
    fn a_repeated_prefix_is_compared_in_any_chunking() {
        let bytes: Vec<u8> = (0..1000u32).map(|i| (i % 251) as u8).collect();
        let crc = |from: usize, to: usize| crc32fast::hash(&bytes[from..to]);
        for chunk in [1, 7, 64, 1000] {
            let tails = [tail(100, 400, crc(0, 300)), tail(300, 900, crc(200, 800)), tail(900, 950, crc(800, 850))];
            let mut check = PrefixCheck::new(&tails);
            for (index, piece) in bytes.chunks(chunk).enumerate() {
                check.observe(Lsn(100 + (index * chunk) as u64), piece).unwrap();
            }
            assert!(check.is_done());
        }
    }

    #[test]
    fn a_single_different_byte_is_a_divergence() {
        let bytes = [5u8; 64];
        let mut other = bytes;
        other[63] ^= 1;
        let mut check = PrefixCheck::new(&[tail(0, 64, crc32fast::hash(&bytes))]);
        assert!(check.observe(Lsn(0), &other[..63]).is_ok());
        assert!(matches!(check.observe(Lsn(63), &other[63..]), Err(Divergence { to: Lsn(64), .. })));
    }
}
