//! Owns: `find`: when did it happen, and which `restore --to …` stops just before it.
//! Does not own: what counts as an event (`catalog::events`), looking for single commits (`restore::commits`), the proof of
//! WAL (`wal`), restoring.

mod names;
mod shown;

use std::collections::BTreeMap;

use super::args::{FindArgs, Global};
use super::repositories::{self, Copy, Look};
use super::{Verdict, keys, output, restore, setup};
use crate::catalog::events::{self, Between, Event, EventKind, Filter};
use crate::catalog::{Archive, CatalogError, Digest, Holdings};
use crate::codec::encrypt::Keys;
use crate::config::ArchiveConfig;
use crate::continuity;
use crate::error::{ExitCode, Failure};
use crate::repository::layout::Lineage;
use crate::restore::commits::{Commits, Looking};
use crate::restore::reach::{Line, Reach};
use crate::restore::search::{ArchiveSearch, SearchError};
use crate::restore::wal_get::{Holder, WalGetError};
use crate::wal::{Carry, History, Lsn, Place, SegmentName, SegmentSummary, TimelineId};
use shown::{Answer, ShownEvent};

/// Commits shown on each side of a place.
const AROUND: u16 = 5;
/// Commits listed between two times.
const LISTED: u16 = 100;

/// What is looked for.
#[derive(Clone, Copy, Debug)]
enum Question {
    /// What the index tells.
    Events(Between),
    /// The commits nearest to a place, and what happened between them.
    Around(Place, usize),
    /// Commits as well.
    Commits(Between, usize),
    Transaction(u32),
}

impl Question {
    fn of(args: &FindArgs) -> Result<Question, Failure> {
        let usage = |message: &str| Err(Failure::new(ExitCode::Usage, message));
        let between = Between { since: args.since, until: args.until };
        let count = |default: u16| usize::from(args.count.unwrap_or(default));
        match (args.around, args.xid, args.commits) {
            (Some(place), ..) => Ok(Question::Around(place, count(AROUND))),
            (_, Some(xid), _) => Ok(Question::Transaction(xid)),
            (.., true) if between == Between::default() => {
                usage("--commits reads the WAL: say with --since or --until of when")
            }
            (.., true) => Ok(Question::Commits(between, count(LISTED))),
            _ if args.count.is_some() => usage("--count is for --around and --commits"),
            _ => Ok(Question::Events(between)),
        }
    }

    fn lists_commits(&self) -> bool {
        !matches!(self, Question::Events(_))
    }
}

/// Where and for what to look, as typed.
struct Find<'a> {
    global: &'a Global,
    config: &'a ArchiveConfig,
    question: Question,
    timeline: Option<TimelineId>,
    lineage: Option<&'a str>,
    filter: Filter,
}

pub fn run(global: &Global, args: &FindArgs) -> Result<Verdict, Failure> {
    let question = Question::of(args)?;
    let archives = setup::archives(global)?;
    let config = ArchiveConfig::choose(&archives, global.cluster.as_deref())?;
    let filter =
        Filter { kinds: args.kind.iter().copied().map(EventKind::from).collect(), relation: args.relation.clone() };
    let (timeline, lineage) = (args.timeline, args.lineage.as_deref());
    let find = Find { global, config, question, timeline, lineage, filter };
    let answer = setup::block_on(find.answer())??;
    match global.json {
        true => output::json(&answer),
        false => answer.print(question.lists_commits(), &shown::command(global, &archives, &config.cluster)),
    }
    Ok(if answer.unread.is_empty() { Verdict::Fine } else { Verdict::Finding })
}

impl Find<'_> {
    async fn answer(&self) -> Result<Answer, Failure> {
        let keys = keys::reading(self.config.identity_file.as_deref())?;
        let nearest = repositories::nearest_first(&self.config.repositories);
        let looks = repositories::look(&nearest, &self.config.cluster).await;
        let newest = restore::lineage(&looks, &self.config.cluster, None)?;
        let one = restore::lineage(&looks, &self.config.cluster, self.lineage)?;
        // Positions and transactions mean something in one lineage only.
        let all = self.lineage.is_none() && !self.question.lists_commits();
        let lineages = repositories::all_lineages(&looks).into_iter().map(|(lineage, _)| lineage);
        let mut answer = Answer::default();
        for lineage in lineages.filter(|lineage| all || *lineage == one) {
            self.add_lineage(&mut answer, &looks, &lineage, lineage == newest, &keys).await?;
        }
        Ok(answer)
    }

    async fn add_lineage(
        &self,
        answer: &mut Answer,
        looks: &[Look],
        lineage: &Lineage,
        is_newest: bool,
        keys: &Keys,
    ) -> Result<(), Failure> {
        let (copies, unread) = repositories::copies(looks, lineage).await;
        answer.unread.extend(
            unread
                .into_iter()
                .map(|unread| format!("repository {} cannot be read: {}", unread.repository, unread.failure)),
        );
        if copies.is_empty() {
            return Ok(());
        }
        let held = repositories::union(lineage, &copies)?;
        let holders = looks.iter().filter(|look| look.file_of(lineage).is_some());
        let holder = |look: &Look| Holder::new(&look.config.name, look.archive(lineage).with_keys(keys.clone()));
        let search = ArchiveSearch {
            holders: holders.map(holder).collect(),
            system_id: lineage.system_id,
            segment_size: held.segment_size,
        };
        let reach = Reach::new(&held, &[]);
        let line = self.line(&reach)?;
        let (said, unread) = said(&copies, &held, &search).await?;
        let mut events = self.events(&said, line.as_ref(), &mut answer.unread);
        let commits = self.commits(&reach, &search, line.as_ref()).await;
        if self.question.lists_commits() {
            events = self.with_commits(events, &commits);
            answer.more |= commits.more;
            answer.unread.extend(commits.unread);
        }
        let unfinished = unread.iter().map(|(name, error)| format!("segment {name}, which is unfinished: {error}"));
        answer.unread.extend(unfinished);
        let evidence = Evidence { said, is_whole: unread.is_empty() };
        let unnamed = names::add(self.global, lineage, &reach, &evidence, &mut events).await;
        answer.unnamed = unnamed.or(answer.unnamed.take());
        events.retain(|event| self.filter.takes(event));
        let newest_path = reach.line(reach.newest()).map(|line| line.path);
        let (cluster, directory) = (&lineage.cluster, lineage.directory_name());
        for mut event in events {
            if newest_path.as_ref().is_none_or(|path| !is_on(path, event.timeline, event.lsn)) {
                event.reached_with(&format!("--timeline {}", event.timeline));
            }
            if !is_newest {
                event.reached_with(&format!("--lineage {directory}"));
            }
            answer.events.push(ShownEvent { cluster: cluster.clone(), lineage: directory.clone(), event });
        }
        Ok(())
    }

    /// The line that is asked about: where none is named, every event counts, and commits are those of the newest line.
    fn line(&self, reach: &Reach<'_>) -> Result<Option<Line>, Failure> {
        let timeline = match (self.timeline, self.question) {
            (Some(timeline), _) => timeline,
            (None, Question::Around(..) | Question::Commits(..)) => reach.newest(),
            (None, Question::Events(_) | Question::Transaction(_)) => return Ok(None),
        };
        let unknown = || {
            let known: Vec<String> = reach.timelines().iter().map(ToString::to_string).collect();
            let message = format!("how timeline {timeline} came to be is not known");
            Failure::new(ExitCode::Usage, message).hint(format!("the archive has: {}", known.join(", ")))
        };
        reach.line(timeline).map(Some).ok_or_else(unknown)
    }

    /// What the index and unfinished segments say, each event once: a child's first segment repeats its parent's records.
    fn events(&self, said: &[Said], line: Option<&Line>, unread: &mut Vec<String>) -> Vec<Event> {
        let between = match self.question {
            Question::Events(between) | Question::Commits(between, _) => between,
            Question::Around(..) | Question::Transaction(_) => Between::default(),
        };
        let mut events: BTreeMap<(Lsn, TimelineId, EventKind), Event> = BTreeMap::new();
        for Said { name, path, summary } in said {
            for event in events::events(name.timeline, summary, between) {
                let timeline = path.at(event.lsn);
                if line.is_none_or(|line| is_on(&line.path, timeline, event.lsn)) {
                    events.insert((event.lsn, timeline, event.kind), Event { timeline, ..event });
                }
            }
            let concerns = line.is_none_or(|line| line.path.contains(name.timeline));
            if summary.truncated && between.may_touch(summary) && concerns && !self.question.lists_commits() {
                unread.push(format!("segment {name} holds more events than its index entry could keep"));
            }
        }
        events.into_values().collect()
    }

    async fn commits(&self, reach: &Reach<'_>, search: &ArchiveSearch, line: Option<&Line>) -> Commits {
        match (self.question, line) {
            (Question::Around(place, count), Some(line)) => Looking { reach, search, line }.around(place, count).await,
            (Question::Commits(between, count), Some(line)) => {
                Looking { reach, search, line }.between(between.since, between.until, count).await
            }
            (Question::Transaction(xid), only) => {
                let mut all = Commits::default();
                for line in reach.timelines().into_iter().filter_map(|timeline| reach.line(timeline)) {
                    if only.is_none_or(|only| only.path.contains(line.path.timeline)) {
                        let commits = Looking { reach, search, line: &line }.ends_of(xid).await;
                        all.found.extend(commits.found);
                        all.unread.extend(commits.unread);
                    }
                }
                all.found.retain(|(timeline, found)| only.is_none_or(|only| is_on(&only.path, *timeline, found.lsn)));
                all
            }
            _ => Commits::default(),
        }
    }

    /// Commits among the events. One that removed something is shown as that.
    fn with_commits(&self, events: Vec<Event>, commits: &Commits) -> Vec<Event> {
        let mut all = events;
        if let Question::Transaction(xid) = self.question {
            all.retain(|event| event.xid == Some(xid));
        }
        if let (Question::Around(..), Some((_, first)), Some((_, last))) =
            (self.question, commits.found.first(), commits.found.last())
        {
            all.retain(|event| (first.lsn..=last.lsn).contains(&event.lsn));
        }
        let is_told = |timeline: TimelineId, lsn: Lsn| {
            all.iter().any(|event| event.kind == EventKind::Drop && (event.timeline, event.lsn) == (timeline, lsn))
        };
        let new: Vec<Event> = commits
            .found
            .iter()
            .filter(|(timeline, found)| !is_told(*timeline, found.lsn))
            .map(|(timeline, found)| events::of_end(*timeline, found))
            .collect();
        all.extend(new);
        all.sort_by_key(|event| (event.lsn, event.timeline));
        all
    }
}

/// What a segment says of itself, and the line it is read along.
#[derive(Debug)]
pub struct Said {
    pub name: SegmentName,
    pub path: History,
    pub summary: SegmentSummary,
}

/// All that a lineage says.
#[derive(Debug)]
pub struct Evidence {
    pub said: Vec<Said>,
    /// Unfinished segments are among it.
    pub is_whole: bool,
}

fn is_on(path: &History, timeline: TimelineId, lsn: Lsn) -> bool {
    path.contains(timeline) && path.at(lsn) == timeline
}

/// What segments say in which something happened, in order of their names, and those that could not be read.
async fn said(
    copies: &[Copy<'_>],
    held: &Holdings,
    search: &ArchiveSearch,
) -> Result<(Vec<Said>, Vec<(SegmentName, SearchError)>), CatalogError> {
    let path = |name: SegmentName| {
        continuity::path_of(name.timeline, &held.histories, held.start_timeline)
            .unwrap_or_else(|| History::root(name.timeline))
    };
    let mut all: BTreeMap<SegmentName, SegmentSummary> = BTreeMap::new();
    for copy in copies {
        let archive = archive_of(search, copy);
        for directory in copy.catalog.directories() {
            let is_new = |digest: &Digest| digest.has_events() && !all.contains_key(&digest.segment);
            let entries = archive.entries(directory, is_new).await?;
            all.extend(entries.into_iter().map(|entry| (entry.segment, entry.summary)));
        }
    }
    let mut unread = Vec::new();
    for name in unfinished(copies) {
        match read_unfinished(copies, held, search, path(name), name).await {
            Ok(summary) => drop(all.insert(name, summary)),
            Err(error) => unread.push((name, error)),
        }
    }
    let said = all.into_iter().map(|(name, summary)| Said { name, path: path(name), summary });
    Ok((said.collect(), unread))
}

fn archive_of<'s>(search: &'s ArchiveSearch, copy: &Copy<'_>) -> &'s Archive {
    let holder = search.holders.iter().find(|holder| holder.repository == copy.repository);
    &holder.expect("whoever has a copy is looked into").archive
}

/// The last segment of each timeline, where there are only tails of it. Others are behind a hole, and `gaps` tells.
fn unfinished(copies: &[Copy<'_>]) -> Vec<SegmentName> {
    let mut last: BTreeMap<TimelineId, SegmentName> = BTreeMap::new();
    let is_open = |name: &&SegmentName| copies.iter().all(|copy| copy.catalog.sealed(**name).is_none());
    for directory in copies.iter().flat_map(|copy| copy.catalog.directories()) {
        for &name in directory.tails.keys().filter(is_open) {
            let known = last.entry(name.timeline).or_insert(name);
            *known = name.max(*known);
        }
    }
    last.into_values().collect()
}

/// Puts the tails together as `wal-get` would, and reads what their records say.
async fn read_unfinished(
    copies: &[Copy<'_>],
    held: &Holdings,
    search: &ArchiveSearch,
    path: History,
    name: SegmentName,
) -> Result<SegmentSummary, SearchError> {
    let size = held.segment_size;
    let start = name.number(size).map(|number| size.start_of(number)).expect("it was listed with this size");
    let end = held.end(name.timeline).unwrap_or(Lsn::ZERO);
    if end <= start {
        // Tails of which none counts.
        return Ok(SegmentSummary::empty(None));
    }
    let before = SegmentName::new(name.timeline, size.segment_before(start), size);
    let carry = match copies.iter().find(|copy| copy.catalog.sealed(before).is_some()) {
        Some(copy) => {
            let contents = archive_of(search, copy).directory_around(before, size).await.map_err(WalGetError::from)?;
            contents.sealed(before).map_or_else(Carry::default, |entry| entry.summary.carry.clone())
        }
        None => Carry::default(),
    };
    search.summary(&path, name, carry, end).await
}
