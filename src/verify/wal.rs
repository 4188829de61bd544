//! Owns: reading segments and tails, in order, through the chain of each timeline.
//! Does not own: one object's checksums (`content.rs`), the chain (`chain.rs`).

use std::collections::BTreeMap;

use super::Run;
use super::chain::Chain;
use super::content::{Coding, Object, Verdict, examine};
use super::listing::{Asker, Ground};
use super::quick::{has_repair, readable};
use super::reader::Reader;
use super::record::{Mode, Position};
use super::report::{Fault, FaultKind, Notes, Span};
use crate::catalog::{Damage, DirectoryContents, IndexEntry, TailLink};
use crate::continuity;
use crate::error::Failure;
use crate::repository::layout::{IndexName, Part, WalDirectory, WalObject};
use crate::wal::{Carry, History, Lsn, ScanOptions, SegmentName, TimelineId};

/// An object of WAL to be read.
#[derive(Clone, Debug)]
struct Job {
    object: Object,
    name: SegmentName,
    from: Lsn,
    /// Bytes below were in the tail before it.
    counts_from: Lsn,
    to: Lsn,
    /// Of a sealed segment.
    entry: Option<IndexEntry>,
    /// An index file that holds the entry.
    index: Option<IndexName>,
    is_repair: bool,
}

impl Job {
    fn span(&self) -> Span {
        match &self.entry {
            Some(entry) => Span::of(entry),
            None => Span::new(self.name.timeline, self.counts_from, self.to),
        }
    }
}

/// States of the proof where child timelines begin, by the parent and the start of the fork's segment.
type Forks = BTreeMap<(TimelineId, Lsn), Option<Carry>>;

/// Which of the objects that the ledger calls damaged still count for something in this directory.
pub fn standing(contents: &DirectoryContents, damages: &[Damage]) -> Vec<String> {
    let counts = |damage: &&Damage| match damage.part() {
        Part::Wal(WalObject::Segment(name, _)) => {
            contents.entries.get(&name).is_some_and(|entry| !has_repair(contents, entry))
        }
        Part::Wal(WalObject::Repair(name, ..)) => contents.repairs.contains_key(&name),
        Part::Tail(name, tail) => {
            let is_listed = contents.tails.get(&name).into_iter().flatten().any(|listed| listed.name == tail);
            is_listed && contents.sealed(name).is_none()
        }
        _ => false,
    };
    damages.iter().filter(counts).map(|damage| damage.object.clone()).collect()
}

impl Run<'_> {
    pub(super) async fn read_wal(&mut self, ground: &Ground) -> Result<(), Failure> {
        let size = ground.file.segment_size;
        let mut forks: Forks = ground
            .histories
            .values()
            .filter_map(History::parent)
            .map(|parent| ((parent.timeline, size.floor(parent.end)), None))
            .collect();
        let mut timelines: BTreeMap<TimelineId, Vec<WalDirectory>> = BTreeMap::new();
        for &directory in &ground.directories {
            timelines.entry(directory.timeline).or_default().push(directory);
        }
        for (timeline, directories) in timelines {
            self.read_timeline(ground, timeline, directories, &mut forks).await?;
        }
        Ok(())
    }

    async fn read_timeline(
        &mut self,
        ground: &Ground,
        timeline: TimelineId,
        directories: Vec<WalDirectory>,
        forks: &mut Forks,
    ) -> Result<(), Failure> {
        let size = ground.file.segment_size;
        let history = continuity::path_of(timeline, &ground.histories, ground.file.start_timeline);
        let is_chained = history.is_some() && self.options.mode == Mode::Full;
        let history = history.unwrap_or_else(|| History::root(timeline));
        // Where the line begins, the parent's chain goes on in it.
        let mut carry = history.parent().and_then(|parent| {
            let start = size.floor(parent.end);
            Some((start, forks.get(&(parent.timeline, start))?.clone()?))
        });
        let options = ScanOptions { system_id: ground.file.system_id, segment_size: size, history };
        let mut chain = Chain::new(options, is_chained);
        for directory in directories {
            // All of it was read before, but for what the first segment behind it goes on from.
            if let Some(Position::Wal(behind)) = self.behind.filter(|_| self.is_behind(directory)) {
                if WalDirectory::of(behind) > directory {
                    continue;
                }
            } else if self.behind.is_some_and(|behind| matches!(behind, Position::Backup(_))) {
                continue;
            }
            chain = self.read_directory(ground, directory, chain, &mut carry, forks).await?;
        }
        Ok(())
    }

    fn is_behind(&self, directory: WalDirectory) -> bool {
        matches!(self.behind, Some(Position::Wal(name)) if directory <= WalDirectory::of(name))
    }

    async fn read_directory(
        &mut self,
        ground: &Ground,
        directory: WalDirectory,
        mut chain: Chain,
        carry: &mut Option<(Lsn, Carry)>,
        forks: &mut Forks,
    ) -> Result<Chain, Failure> {
        let size = ground.file.segment_size;
        let seen = self.asker.directory(directory, size, &ground.expired, &mut Notes::default()).await?;
        let mut jobs = jobs(&self.asker, &seen.contents);
        if let Some(Position::Wal(behind)) = self.behind {
            let read_before = jobs.iter().rfind(|job| job.name <= behind).and_then(|job| job.entry.as_ref());
            if let Some(entry) = read_before {
                *carry = Some((entry.end_lsn, entry.summary.carry.clone()));
            }
            let is_before = |job: &Job| job.entry.is_some() && job.name <= behind;
            self.advance(jobs.iter().filter(|job| is_before(job)).map(|job| job.object.stored_bytes).sum());
            jobs.retain(|job| !is_before(job));
        }
        jobs.retain(|job| self.is_chosen(&job.object.below) && !self.is_told(&job.object.below));
        let wanted = jobs.iter().map(|job| job.object.wanted()).collect();
        let mut reader = Reader::start(&self.asker.archive, wanted, &self.options.pace, self.options.patience);
        for (index, job) in jobs.iter().enumerate() {
            let known = carry.take_if(|(at, _)| *at == job.counts_from).map(|(_, carry)| carry);
            chain.begin(job.from, job.counts_from, known);
            let before = chain.carry();
            if let Some(fork) = forks.get_mut(&(directory.timeline, job.counts_from)) {
                *fork = before.clone();
            }
            let (verdict, used) = self.job(&mut reader, index, job, chain).await?;
            chain = used;
            self.read(&job.object, matches!(verdict, Verdict::Sound { .. }));
            self.counts.segments_read += u64::from(job.entry.is_some());
            match verdict {
                Verdict::Sound { is_content_examined: true } => {}
                Verdict::Sound { is_content_examined: false } => self.counts.unexamined += 1,
                Verdict::Faulty(..) => {
                    if let Some(fault) = self.again(job, chain.anew(), before).await? {
                        self.found(fault).await?;
                    }
                }
            }
            for (entry, lie) in chain.take_lies() {
                let index = jobs.iter().find(|job| job.name == entry.segment).and_then(|job| job.index);
                let object = match index {
                    Some(index) => self.asker.below(&self.asker.archive.lineage.index(index)),
                    None => job.object.below.clone(),
                };
                let what = format!("segment {}: {lie}", entry.segment);
                self.found(Fault::new(object, FaultKind::Record, what).indirect().of_wal(Span::of(&entry))).await?;
            }
            if job.entry.is_some() {
                self.note_progress(&job.object.below).await?;
            }
        }
        Ok(chain)
    }

    async fn job(
        &self,
        reader: &mut Reader,
        index: usize,
        job: &Job,
        chain: Chain,
    ) -> Result<(Verdict, Chain), Failure> {
        let identities = self.asker.archive.keys.identities.as_ref();
        let (verdict, mut chain) = examine(reader, index, &job.object, identities, chain).await?;
        let verdict = match verdict {
            Verdict::Sound { is_content_examined: true } => match chain.finish(job.entry.as_ref()) {
                Some(fault) => Verdict::Faulty(FaultKind::Chain, fault),
                None => verdict,
            },
            _ => {
                chain.break_off();
                verdict
            }
        };
        Ok((verdict, chain))
    }

    /// The second look at a fault, at the object and at whether it is still meant to be there.
    async fn again(&self, job: &Job, mut chain: Chain, carry: Option<Carry>) -> Result<Option<Fault>, Failure> {
        self.pause().await;
        chain.begin(job.from, job.counts_from, carry);
        let wanted = vec![job.object.wanted()];
        let mut reader = Reader::start(&self.asker.archive, wanted, &self.options.pace, self.options.patience);
        let (verdict, _) = self.job(&mut reader, 0, job, chain).await?;
        let Verdict::Faulty(kind, what) = verdict else { return Ok(None) };
        let mut notes = Notes::default();
        let ground = self.asker.ground(&mut notes).await?;
        let directory = WalDirectory::of(job.name);
        let seen = self.asker.directory(directory, ground.file.segment_size, &ground.expired, &mut notes).await?;
        let now = jobs(&self.asker, &seen.contents);
        let same = now.iter().any(|now| now.object.below == job.object.below && now.entry == job.entry);
        // A missing segment is no job any more, and its entry still names it.
        let entry = job.entry.as_ref().and_then(|entry| seen.contents.entries.get(&entry.segment));
        let is_named = entry.is_some_and(|entry| !has_repair(&seen.contents, entry) || job.is_repair);
        Ok((same || is_named).then(|| Fault::new(&job.object.below, kind, what).of_wal(job.span())))
    }
}

/// What there is to read in a directory, in order.
fn jobs(asker: &Asker, contents: &DirectoryContents) -> Vec<Job> {
    let mut names: Vec<SegmentName> = contents.entries.keys().chain(contents.tails.keys()).copied().collect();
    names.sort();
    names.dedup();
    let mut jobs = Vec::new();
    for name in names {
        match contents.entries.get(&name).and_then(|entry| Some((entry, readable(contents, entry)?))) {
            Some((entry, (object, found))) => {
                let lineage = &asker.archive.lineage;
                let (key, is_repair) = match object {
                    WalObject::Repair(name, crc32, form) => (lineage.repair(name, crc32, form), true),
                    _ => (lineage.segment(name, found.form), false),
                };
                let object = Object {
                    below: asker.below(&key),
                    key,
                    form: found.form,
                    coding: Coding::Frames,
                    stored_bytes: found.stored_bytes,
                    // What is encrypted anew has other bytes.
                    stored_crc32: (!is_repair).then_some(entry.stored_crc32.0),
                    raw_bytes: entry.raw_bytes,
                    raw_crc32: Some(entry.raw_crc32.0),
                    by: "the index",
                };
                let covers = |index: &&(IndexName, u64)| index.0.first <= name && name <= index.0.last;
                let index = contents.index_files.iter().find(covers).map(|(index, _)| *index);
                let (from, to) = (entry.start_lsn, entry.end_lsn);
                let entry = Some(entry.clone());
                jobs.push(Job { object, name, from, counts_from: from, to, entry, index, is_repair });
            }
            None if contents.disputed.contains_key(&name) => {}
            None => jobs
                .extend(contents.tail_chain(name).links.into_iter().map(|link| tail_job(asker, contents, name, link))),
        }
    }
    jobs
}

fn tail_job(asker: &Asker, contents: &DirectoryContents, name: SegmentName, link: TailLink) -> Job {
    let TailLink { tail, from: counts_from, to } = link;
    let listed = contents.tails.get(&name).into_iter().flatten().find(|listed| listed.name == tail);
    let key = asker.archive.lineage.tail(name, &tail);
    let object = Object {
        below: asker.below(&key),
        key,
        form: tail.form,
        coding: Coding::Frames,
        stored_bytes: listed.map_or(0, |listed| listed.stored_bytes),
        stored_crc32: None,
        raw_bytes: tail.to - tail.from,
        raw_crc32: Some(tail.raw_crc32),
        by: "its name",
    };
    Job { object, name, from: tail.from, counts_from, to, entry: None, index: None, is_repair: false }
}
