//! Owns: what follows from an agent's facts: what would be lost now, what is not as it should be, whether a cluster is
//! protected.
//! Does not own: where the facts come from (`agent/observer.rs`), who is told (`http.rs`). Pure: time is an argument.

use std::collections::VecDeque;
use std::time::Duration;

use jiff::Timestamp;

use super::backup::{BackupEntry, BackupRunning, NextBackup};
use super::retention::RetentionFacts;
use super::status::{ClusterStatus, Health, RepositoryStatus, SlotStatus, State, size};
use crate::receiver::Acknowledge;
use crate::verify::record::LastVerify;
use crate::wal::{Lsn, SystemId, TimelineId};

/// What one cluster's agent knows at one moment.
#[derive(Clone, Debug, Default)]
pub struct ClusterFacts {
    pub name: String,
    pub state: State,
    pub system_id: Option<SystemId>,
    pub timeline: Option<TimelineId>,
    pub acknowledge: Acknowledge,
    /// `None` before the first stream.
    pub positions: Option<Positions>,
    /// What would be lost if the server burned now: since when not all it had was durable. `None`: never was.
    pub rpo: Option<Duration>,
    /// Since when not all that was received is durable.
    pub lag: Option<Duration>,
    /// How long the durable position has stood still behind what is proven.
    pub tail_age: Option<Duration>,
    /// More than this is not as it should be.
    pub rpo_max: Duration,
    /// The newest durable one, by the server's clock.
    pub last_commit: Option<Timestamp>,
    /// In the order of the configuration.
    pub repositories: Vec<RepositoryFacts>,
    /// How many of them must hold a byte.
    pub required: usize,
    pub held_bytes: u64,
    pub held_limit_bytes: u64,
    pub spool: Option<SpoolFacts>,
    pub slot: SlotFacts,
    /// Open ones; `None`: not looked at.
    pub gaps: Option<usize>,
    pub backups: BackupFacts,
    pub retention: RetentionFacts,
    /// How many objects in the repositories are damaged and not mended; one of them, and why.
    pub damaged: Option<(usize, String)>,
    /// `None`: never, or not known yet.
    pub last_verify: Option<LastVerify>,
    /// Why there is no stream.
    pub failure: Option<String>,
    /// Why less is acknowledged than the contract promises.
    pub contract_broken: Option<String>,
    /// Commits wait for this archive although nobody configured that.
    pub accidental_standby: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Positions {
    pub server: Lsn,
    pub received: Lsn,
    pub proven: Lsn,
    pub durable: Lsn,
    /// Zero: not reporting.
    pub acknowledged: Lsn,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RepositoryFacts {
    pub name: String,
    /// `None`: unknown.
    pub frontier: Option<Lsn>,
    pub state: RepositoryState,
    /// Why it is not `Ok`.
    pub reason: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RepositoryState {
    /// No stream: nothing is known.
    #[default]
    Unknown,
    Ok,
    /// It takes WAL, but was left out for a while; what it misses is held by another.
    Behind,
    /// What it misses is being copied to it.
    Repairing,
    /// It does not take what it is given; this is tried again.
    Failing,
    /// It is not there, or may not be used.
    Unavailable,
}

impl RepositoryState {
    pub const ALL: [RepositoryState; 6] = [
        RepositoryState::Unknown,
        RepositoryState::Ok,
        RepositoryState::Behind,
        RepositoryState::Repairing,
        RepositoryState::Failing,
        RepositoryState::Unavailable,
    ];

    pub fn word(self) -> &'static str {
        match self {
            RepositoryState::Unknown => "unknown",
            RepositoryState::Ok => "ok",
            RepositoryState::Behind => "behind",
            RepositoryState::Repairing => "repairing",
            RepositoryState::Failing => "failing",
            RepositoryState::Unavailable => "unavailable",
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpoolFacts {
    pub used_bytes: u64,
    pub limit_bytes: u64,
}

/// The slot as the server showed it last; all `None` where it was not seen lately.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SlotFacts {
    pub name: String,
    pub wal_status: Option<String>,
    pub safe_wal_bytes: Option<i64>,
    pub is_active: Option<bool>,
    /// Why its WAL is gone.
    pub lost: Option<String>,
}

/// What is known of a cluster's backups.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BackupFacts {
    /// Whether the repositories have been looked at; nothing below says anything before.
    pub is_known: bool,
    /// The newest complete one.
    pub last: Option<BackupEntry>,
    /// Repositories that take part and hold no complete one.
    pub missing: Vec<String>,
    /// A gap lies between the newest one and now.
    pub is_behind_gap: bool,
    /// Taken by this agent.
    pub running: Option<BackupRunning>,
    /// Of the schedule; `None`: there is none, or nothing to go on from yet.
    pub next: Option<NextBackup>,
    /// Of this agent, since it started.
    pub failures: u64,
    /// Why the last attempt came to nothing, until one succeeds.
    pub failure: Option<String>,
}

impl BackupFacts {
    pub fn last_id(&self) -> Option<String> {
        self.last.as_ref().map(|entry| entry.id.clone())
    }

    /// What is on its way, behind what is not there.
    fn outlook(&self) -> String {
        match (&self.running, &self.failure) {
            (Some(running), _) => format!("; {}", running.to_text()),
            (None, Some(why)) => format!("; the last attempt failed: {why}"),
            (None, None) => String::new(),
        }
    }
}

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub health: Health,
    /// A commit of now, or of the past, could be lost: the cluster is not protected.
    pub exposes: bool,
    pub text: String,
}

impl ClusterFacts {
    /// Everything that is not as it should be, the worst first to be thought of first.
    pub fn findings(&self) -> Vec<Finding> {
        let mut findings = Vec::new();
        let mut find = |health, exposes, text: String| findings.push(Finding { health, exposes, text });
        let why = self.failure.as_deref();
        match self.state {
            State::Streaming => {}
            State::Paused => find(
                Health::Degraded,
                false,
                "not reading: the repository takes WAL slower than the server writes it".to_string(),
            ),
            State::Connecting => {
                find(Health::Failing, true, format!("not streaming: {}", why.unwrap_or("connecting")));
            }
            State::Waiting => find(
                Health::Degraded,
                true,
                format!("not streaming: {}", why.unwrap_or("another agent archives this cluster")),
            ),
            State::Fenced => {
                find(Health::Failing, true, "fenced: another agent has taken over the archive".to_string())
            }
            State::Stopped => {
                find(Health::Failing, true, format!("stopped until an operator acts: {}", why.unwrap_or("unknown")));
            }
        }
        if let Some(rpo) = self.rpo.filter(|rpo| *rpo > self.rpo_max) {
            let lag = self.lag_bytes().map(|bytes| format!(" ({})", size(bytes))).unwrap_or_default();
            find(Health::Failing, true, format!("not durable since {} s{lag}", rpo.as_secs()));
        }
        self.find_in_repositories(&mut find);
        if let Some(why) = &self.contract_broken {
            find(Health::Degraded, true, format!("less is acknowledged than promised: {why}"));
        }
        if let Some((count, first)) = &self.damaged {
            find(Health::Degraded, true, format!("{count} damaged object(s) in the archive: {first}"));
        }
        if let Some(count @ 1..) = self.gaps {
            find(Health::Degraded, true, format!("{count} open gap(s) in the archive: see `seawall gaps`"));
        }
        self.find_in_backups(&mut find);
        if let Some(why) = &self.retention.failure {
            find(Health::Degraded, false, format!("retention could not be applied, nothing needed is lost: {why}"));
        }
        if let Some(reason) = self.last_verify.and_then(|last| last.reason()) {
            find(Health::Degraded, false, reason);
        }
        let slot = &self.slot.name;
        if let Some(why) = &self.slot.lost {
            find(Health::Failing, true, format!("slot {slot} is lost: {why}"));
        } else if self.slot.wal_status.as_deref() == Some("unreserved") {
            find(Health::Failing, true, format!("slot {slot} may lose its WAL at the next checkpoint"));
        }
        if self.accidental_standby {
            let text = "commits on the server wait for this archive, although `synchronous` is not set";
            find(Health::Degraded, false, text.to_string());
        }
        findings
    }

    fn find_in_backups(&self, find: &mut impl FnMut(Health, bool, String)) {
        let backups = &self.backups;
        if !backups.is_known {
            // Without a stream there is worse to say.
            if matches!(self.state, State::Streaming | State::Paused) {
                find(Health::Degraded, true, "it is not known yet whether there is a base backup".to_string());
            }
            return;
        }
        let outlook = backups.outlook();
        match (&backups.last, &backups.missing[..]) {
            (None, _) => {
                find(Health::Degraded, true, format!("there is no base backup: nothing can be restored{outlook}"))
            }
            (Some(_), []) if backups.is_behind_gap => {
                let text =
                    format!("a gap follows the newest base backup: what came after it cannot be restored{outlook}");
                find(Health::Degraded, true, text);
            }
            (Some(_), []) if backups.failure.is_some() => {
                find(Health::Degraded, false, format!("no new base backup{outlook}"));
            }
            (Some(_), []) => {}
            (Some(_), missing) => {
                let text = format!("there is no base backup in repository {}{outlook}", missing.join(", "));
                find(Health::Degraded, true, text);
            }
        }
    }

    fn find_in_repositories(&self, find: &mut impl FnMut(Health, bool, String)) {
        let is_missing =
            |state: RepositoryState| matches!(state, RepositoryState::Failing | RepositoryState::Unavailable);
        let missing = self.repositories.iter().filter(|repository| is_missing(repository.state)).count();
        let is_short = self.repositories.len() - missing < self.required;
        for repository in &self.repositories {
            let name = &repository.name;
            let why = repository.reason.as_deref().map(|why| format!(": {why}")).unwrap_or_default();
            match repository.state {
                RepositoryState::Unknown | RepositoryState::Ok => {}
                RepositoryState::Behind => find(Health::Degraded, true, format!("repository {name} is behind{why}")),
                RepositoryState::Repairing => {
                    find(Health::Degraded, true, format!("repository {name} is being repaired{why}"));
                }
                RepositoryState::Failing | RepositoryState::Unavailable => {
                    let health = if is_short { Health::Failing } else { Health::Degraded };
                    find(health, true, format!("repository {name} does not take WAL{why}"));
                }
            }
        }
    }

    pub fn lag_bytes(&self) -> Option<u64> {
        let positions = self.positions.filter(|positions| positions.durable != Lsn::ZERO)?;
        Some(positions.server.saturating_distance(positions.durable))
    }

    /// As `status` says it.
    pub fn to_status(&self) -> ClusterStatus {
        let known = |lsn: fn(&Positions) -> Lsn| self.positions.as_ref().map(lsn).filter(|lsn| *lsn != Lsn::ZERO);
        let mut status = ClusterStatus {
            name: self.name.clone(),
            system_id: self.system_id.map(|id| id.to_string()),
            timeline: self.timeline.map(|timeline| timeline.0),
            state: Some(self.state),
            acknowledge: self.acknowledge.into(),
            server_lsn: known(|positions| positions.server),
            received_lsn: known(|positions| positions.received),
            proven_lsn: known(|positions| positions.proven),
            durable_lsn: known(|positions| positions.durable),
            acknowledged_lsn: known(|positions| positions.acknowledged),
            rpo_seconds: self.rpo.map(|rpo| rpo.as_secs_f64()),
            lag_bytes: self.lag_bytes(),
            repositories: self.repositories.iter().map(RepositoryFacts::to_status).collect(),
            slot: SlotStatus {
                name: self.slot.name.clone(),
                wal_status: self.slot.wal_status.clone(),
                safe_wal_bytes: self.slot.safe_wal_bytes,
                hours_left: None,
            },
            last_backup: self.backups.last.clone(),
            backup_running: self.backups.running.clone(),
            retention: self.retention.to_status(),
            next_backup: self.backups.next.clone(),
            last_verify: self.last_verify,
            window: None,
            gaps: self.gaps,
            health: Health::Ok,
            reasons: Vec::new(),
            last_commit: self.last_commit,
        };
        for finding in self.findings() {
            status.finding(finding.health, finding.text);
        }
        status
    }
}

impl RepositoryFacts {
    fn to_status(&self) -> RepositoryStatus {
        RepositoryStatus {
            name: self.name.clone(),
            frontier_lsn: self.frontier.filter(|lsn| *lsn != Lsn::ZERO),
            state: self.state.word().to_string(),
        }
    }
}

/// Since when not everything up to a moving target is durable, from looks at both now and then.
///
/// Holds a bounded number of looks: where more would be needed, neighbours are joined, and the answer is at most one
/// interval between them too pessimistic.
#[derive(Clone, Debug, Default)]
pub struct LossClock {
    /// The newest moment from which everything is durable.
    safe_at: Option<Duration>,
    /// Targets that are not durable yet, with the last moment each was seen to be the target.
    pending: VecDeque<(Duration, Lsn)>,
}

/// A store that is down for hours costs this many looks, not one per second.
const PENDING_MAX: usize = 256;

impl LossClock {
    pub fn handle_look(&mut self, now: Duration, target: Lsn, durable: Lsn) {
        if durable == Lsn::ZERO {
            return;
        }
        while let Some(&(at, position)) = self.pending.front() {
            if position > durable {
                break;
            }
            self.safe_at = self.safe_at.max(Some(at));
            self.pending.pop_front();
        }
        if target <= durable {
            self.pending.clear();
            self.safe_at = Some(now);
            return;
        }
        match self.pending.back_mut() {
            Some((at, position)) if *position == target => *at = now,
            _ => self.pending.push_back((now, target)),
        }
        if self.pending.len() > PENDING_MAX {
            // The newest stays; every other one goes.
            let mut keep = self.pending.len().is_multiple_of(2);
            self.pending.retain(|_| {
                keep = !keep;
                keep
            });
        }
    }

    /// How long ago everything was durable; `None` when it never was.
    pub fn since(&self, now: Duration) -> Option<Duration> {
        Some(now.saturating_sub(self.safe_at?))
    }

    /// Nothing is known to be safe any more: another server's positions follow.
    pub fn forget_targets(&mut self) {
        self.pending.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::monitor::backup::BackupStatus;
    use crate::repository::layout::BackupType;
    use proptest::prelude::*;

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn nothing_is_lost_while_everything_is_durable() {
        let mut clock = LossClock::default();
        assert_eq!(clock.since(seconds(9)), None);
        clock.handle_look(seconds(10), Lsn(100), Lsn::ZERO);
        assert_eq!(clock.since(seconds(10)), None, "not reporting yet");
        clock.handle_look(seconds(11), Lsn(100), Lsn(100));
        assert_eq!(clock.since(seconds(11)), Some(Duration::ZERO));
    }

    #[test]
    fn the_loss_begins_where_the_target_was_last_durable() {
        let mut clock = LossClock::default();
        clock.handle_look(seconds(10), Lsn(100), Lsn(100));
        clock.handle_look(seconds(11), Lsn(200), Lsn(100));
        clock.handle_look(seconds(12), Lsn(200), Lsn(100));
        clock.handle_look(seconds(13), Lsn(300), Lsn(100));
        assert_eq!(clock.since(seconds(13)), Some(seconds(3)));
        // 200 was everything until second 12.
        clock.handle_look(seconds(14), Lsn(400), Lsn(250));
        assert_eq!(clock.since(seconds(14)), Some(seconds(2)));
        clock.handle_look(seconds(15), Lsn(400), Lsn(400));
        assert_eq!(clock.since(seconds(15)), Some(Duration::ZERO));
    }

    proptest! {
        /// Never better than the truth, and bounded.
        #[test]
        fn the_loss_is_never_understated(steps in proptest::collection::vec((0_u64..50, 0_u64..60), 1..2000)) {
            let mut clock = LossClock::default();
            let (mut target, mut durable) = (100, 100);
            let mut history = Vec::new();
            for (second, (written, stored)) in steps.into_iter().enumerate() {
                let now = seconds(second as u64);
                target += written;
                durable = (durable + stored).min(target);
                history.push((now, target));
                clock.handle_look(now, Lsn(target), Lsn(durable));
                prop_assert!(clock.pending.len() <= PENDING_MAX);
                // The truth: everything was durable at the last moment whose target is durable now.
                let truth = history.iter().rev().find(|(_, position)| *position <= durable).map(|(at, _)| now - *at);
                if let Some(said) = clock.since(now) {
                    prop_assert!(truth.is_some_and(|truth| said >= truth), "{said:?} {truth:?}");
                }
            }
        }
    }

    fn healthy() -> ClusterFacts {
        let entry = BackupEntry {
            id: "20261122T110000Z-full".into(),
            backup_type: BackupType::Full,
            parent: None,
            started: Timestamp::UNIX_EPOCH,
            finished: None,
            start_lsn: None,
            stop_lsn: None,
            timeline: None,
            raw_bytes: None,
            stored_bytes: None,
            status: BackupStatus::Complete,
            pinned: false,
            label: None,
            postgres_version: None,
            cluster: "main".into(),
            lineage: "7".into(),
            repositories: vec!["local".into()],
            cause: None,
        };
        let repository = RepositoryFacts {
            name: "local".into(),
            frontier: Some(Lsn(100)),
            state: RepositoryState::Ok,
            reason: None,
        };
        let positions = Positions {
            server: Lsn(100),
            received: Lsn(100),
            proven: Lsn(100),
            durable: Lsn(100),
            acknowledged: Lsn(100),
        };
        ClusterFacts {
            name: "main".into(),
            state: State::Streaming,
            positions: Some(positions),
            rpo: Some(Duration::ZERO),
            rpo_max: seconds(60),
            repositories: vec![repository.clone(), RepositoryFacts { name: "offsite".into(), ..repository }],
            required: 1,
            backups: BackupFacts { is_known: true, last: Some(entry), ..BackupFacts::default() },
            retention: RetentionFacts::default(),
            ..ClusterFacts::default()
        }
    }

    #[test]
    fn findings_say_what_is_wrong_and_whether_it_exposes() {
        assert_eq!(healthy().findings(), []);
        assert_eq!(healthy().to_status().health, Health::Ok);
        type Break = fn(&mut ClusterFacts);
        let cases: [(Break, Health, bool, &str); 13] = [
            (|f| f.state = State::Connecting, Health::Failing, true, "not streaming: connecting"),
            (|f| f.state = State::Paused, Health::Degraded, false, "not reading"),
            (|f| f.state = State::Waiting, Health::Degraded, true, "another agent"),
            (|f| f.state = State::Stopped, Health::Failing, true, "stopped until an operator acts"),
            (|f| f.rpo = Some(seconds(61)), Health::Failing, true, "not durable since 61 s"),
            (
                |f| f.repositories[1].state = RepositoryState::Failing,
                Health::Degraded,
                true,
                "offsite does not take WAL",
            ),
            (
                |f| (f.repositories[0].state, f.required) = (RepositoryState::Unavailable, 2),
                Health::Failing,
                true,
                "repository local does not take WAL",
            ),
            (|f| f.gaps = Some(2), Health::Degraded, true, "2 open gap(s)"),
            (
                |f| f.damaged = Some((1, "x: gone".into())),
                Health::Degraded,
                true,
                "1 damaged object(s) in the archive: x",
            ),
            (|f| f.slot.lost = Some("wal_removed".into()), Health::Failing, true, "is lost: wal_removed"),
            (|f| f.slot.wal_status = Some("unreserved".into()), Health::Failing, true, "next checkpoint"),
            (|f| f.contract_broken = Some("the spool is full".into()), Health::Degraded, true, "the spool is full"),
            (|f| f.accidental_standby = true, Health::Degraded, false, "`synchronous` is not set"),
        ];
        for (spoil, health, exposes, text) in cases {
            let mut facts = healthy();
            spoil(&mut facts);
            let findings = facts.findings();
            assert_eq!(findings.len(), 1, "{findings:?}");
            assert_eq!((findings[0].health, findings[0].exposes), (health, exposes), "{findings:?}");
            assert!(findings[0].text.contains(text), "{findings:?}");
        }
    }

    #[test]
    fn without_a_base_backup_nothing_is_protected() {
        let there = healthy().backups;
        let none = BackupFacts { is_known: true, missing: vec!["local".into()], ..BackupFacts::default() };
        let running = BackupRunning { phase: "copying".into(), raw_bytes: 1024, ..BackupRunning::default() };
        let failed = Some("no room".to_string());
        let cases = [
            (BackupFacts::default(), Some((true, "not known yet"))),
            (there.clone(), None),
            (none.clone(), Some((true, "there is no base backup: nothing can be restored"))),
            (BackupFacts { running: Some(running), ..none.clone() }, Some((true, "backup: copying, 1.0 KiB"))),
            (BackupFacts { failure: failed.clone(), ..none }, Some((true, "the last attempt failed: no room"))),
            (BackupFacts { failure: failed, ..there.clone() }, Some((false, "no new base backup; the last attempt"))),
            (BackupFacts { is_behind_gap: true, ..there.clone() }, Some((true, "a gap follows the newest"))),
            (BackupFacts { missing: vec!["offsite".into()], ..there }, Some((true, "in repository offsite"))),
        ];
        for (backups, expected) in cases {
            let findings = ClusterFacts { backups, ..healthy() }.findings();
            let found = findings.first().map(|finding| (finding.exposes, finding.text.as_str()));
            let agrees = match (found, expected) {
                (Some((exposes, text)), Some((expected, words))) => exposes == expected && text.contains(words),
                (found, expected) => found.is_none() && expected.is_none(),
            };
            assert!(agrees && findings.len() <= 1, "{findings:?} instead of {expected:?}");
        }
    }

    #[test]
    fn what_is_unknown_is_null() {
        let json = serde_json::to_value(ClusterFacts::default().to_status()).unwrap();
        for key in ["system_id", "timeline", "server_lsn", "durable_lsn", "rpo_seconds", "lag_bytes", "gaps", "window"]
        {
            assert!(json[key].is_null() && json.as_object().unwrap().contains_key(key), "{key}: {json}");
        }
        let again: ClusterStatus = serde_json::from_value(json).unwrap();
        assert_eq!((again.state, again.health), (Some(State::Connecting), Health::Failing));
    }
}
