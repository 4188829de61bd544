//! Owns: `verify`: every lineage in every repository, one after the other; as table, JSON and exit code.
//! Does not own: what is examined (`verify`), when the agent does (`agent/verify.rs`).

use jiff::Timestamp;
use serde::Serialize;
use tokio::sync::watch;

use super::args::{Global, VerifyArgs};
use super::progress::{Shown, Step};
use super::repositories::{self, Look};
use super::{Verdict, keys, output, setup};
use crate::config::ArchiveConfig;
use crate::error::{ExitCode, Failure};
use crate::repository::layout::Lineage;
use crate::verify::record::Mode;
use crate::verify::report::{Counts, FaultKind, Finding, Report};
use crate::verify::{Outcome, Pace, Progress, VerifyOptions, verify};
use crate::wal::Lsn;

#[derive(Debug, Default, Serialize)]
struct Answer {
    repositories: Vec<Examined>,
    /// Of what they hold, nothing is known.
    unread: Vec<Unread>,
}

/// One lineage in one repository.
#[derive(Debug, Serialize)]
struct Examined {
    repository: String,
    cluster: String,
    lineage: String,
    mode: Mode,
    /// All of it was done.
    complete: bool,
    started: Timestamp,
    finished: Option<Timestamp>,
    /// An earlier run was gone on with, which began then.
    resumed: Option<Timestamp>,
    #[serde(flatten)]
    counts: Counts,
    faults: Vec<ShownFault>,
    notes: Vec<String>,
    unknown: Vec<String>,
    unknown_count: u64,
    /// Why the ledger was told nothing.
    unrecorded: Option<String>,
}

#[derive(Debug, Serialize)]
struct ShownFault {
    object: String,
    kind: FaultKind,
    fault: String,
    means: String,
    remedy: String,
    timeline: Option<u32>,
    from_lsn: Option<Lsn>,
    to_lsn: Option<Lsn>,
    backup: Option<String>,
    known_since: Option<Timestamp>,
}

#[derive(Debug, Serialize)]
struct Unread {
    repository: String,
    cluster: String,
    error: String,
    hint: Option<String>,
}

pub fn run(global: &Global, args: &VerifyArgs) -> Result<Verdict, Failure> {
    if args.drill {
        return Err(Failure::new(ExitCode::Usage, "this version of seawall has no drills").hint(
            "`seawall verify --full` reads everything; `seawall restore` into an empty directory proves the rest",
        ));
    }
    // A name instead of a URL: which of those that are configured.
    let only = global.repository.clone().filter(|named| !named.contains("://"));
    let global = &Global { repository: global.repository.clone().filter(|_| only.is_none()), ..global.clone() };
    let mut archives = setup::chosen_archives(global)?;
    if let Some(only) = &only {
        let known: Vec<String> =
            archives.iter().flat_map(|config| &config.repositories).map(|one| one.name.clone()).collect();
        if !known.contains(only) {
            return Err(Failure::new(ExitCode::Usage, format!("there is no repository {only}"))
                .hint(format!("configured are {}; a URL names any other", known.join(", "))));
        }
    }
    let shown = Shown::new(global);
    let roots = archives.iter().map(|config| config.repositories.len()).sum::<usize>().max(1);
    let (answer, failure) = setup::block_on_threads(setup::threads_for_roots(roots), async {
        let mut answer = Answer::default();
        let mut failure = None;
        for config in &mut archives {
            let is_alone = config.repositories.len() == 1;
            config.repositories.retain(|repository| only.as_ref().is_none_or(|only| repository.name == *only));
            if !config.repositories.is_empty() {
                let failed = examine(config, is_alone, args, &shown, &mut answer).await?;
                failure = failure.or(failed);
            }
        }
        Ok::<_, Failure>((answer, failure))
    })??;
    drop(shown);
    match global.json {
        true => output::json(&answer),
        false => print(&answer),
    }
    let is_sound = answer.repositories.iter().all(|one| one.faults.is_empty());
    match (is_sound, failure) {
        (false, _) => Ok(Verdict::Finding),
        (true, Some(failure)) => Err(failure),
        (true, None) => Ok(Verdict::Fine),
    }
}

/// Everything of one cluster; the first failure to read, if there was one.
async fn examine(
    config: &ArchiveConfig,
    is_alone: bool,
    args: &VerifyArgs,
    shown: &Shown,
    answer: &mut Answer,
) -> Result<Option<Failure>, Failure> {
    let options = VerifyOptions {
        mode: match (args.full, args.sample) {
            (true, _) => Mode::Full,
            (false, Some(_)) => Mode::Sample,
            (false, None) => Mode::Quick,
        },
        share: args.sample.unwrap_or_default(),
        seed: args.seed.unwrap_or_else(|| fastrand::u64(..)),
        pace: Pace::new(args.max_rate.or(config.verify.max_rate)),
        restart: args.restart,
        is_alone,
        ..VerifyOptions::default()
    };
    let keys = keys::reading(config.identity_file.as_deref())?;
    let looks = repositories::look(&config.repositories, &config.cluster).await;
    let mut first = None;
    let unread = |look: &Look, failure: &Failure| Unread {
        repository: look.config.name.clone(),
        cluster: config.cluster.clone(),
        error: failure.message.clone(),
        hint: failure.hint.clone(),
    };
    if repositories::all_lineages(&looks).is_empty() && looks.iter().all(|look| look.readable().is_ok()) {
        return Err(repositories::nothing(&looks, &config.cluster));
    }
    for look in &looks {
        if let Err(failure) = look.readable() {
            answer.unread.push(unread(look, &failure));
            first.get_or_insert(failure);
            continue;
        }
        for (lineage, _) in look.lineages() {
            let archive = look.archive(lineage).with_keys(keys.clone());
            let (progress, watching) = watch::channel(Progress::default());
            let name = &look.config.name;
            let Outcome { report, failure } = tokio::select! {
                outcome = verify(&archive, &options, &progress) => outcome,
                () = shown.follow(watching, step, |progress, _| line(name, progress)) => {
                    unreachable!("it follows for as long as it is asked to")
                }
            };
            answer.repositories.push(examined(look, lineage, report));
            if let Some(failure) = failure {
                answer.unread.push(unread(look, &failure));
                first.get_or_insert(failure.context(format_args!("repository {name}")));
            }
        }
    }
    Ok(first)
}

fn step(progress: &Progress) -> Step {
    let phase = if progress.is_reading { "reading" } else { "looking" };
    Step { phase, done: progress.done, total: progress.total }
}

fn line(repository: &str, progress: &Progress) -> String {
    match progress.is_reading {
        false => format!("verify: looking at repository {repository}"),
        true => format!(
            "verify: {} of {} read in repository {repository}, {} faults",
            output::size(progress.done),
            output::size(progress.total),
            progress.faults
        ),
    }
}

fn examined(look: &Look, lineage: &Lineage, report: Report) -> Examined {
    let mut notes = report.notes.lines;
    if report.notes.omitted > 0 {
        notes.push(format!("{} more notes", report.notes.omitted));
    }
    Examined {
        repository: look.config.name.clone(),
        cluster: lineage.cluster.clone(),
        lineage: lineage.directory_name(),
        mode: report.mode,
        complete: report.complete,
        started: report.started,
        finished: report.finished,
        resumed: report.resumed,
        counts: report.counts,
        faults: report.findings.into_iter().map(shown_fault).collect(),
        notes,
        unknown: report.notes.unknown,
        unknown_count: report.notes.unknown_count,
        unrecorded: report.unrecorded,
    }
}

fn shown_fault(Finding { fault, means, remedy }: Finding) -> ShownFault {
    ShownFault {
        object: fault.object,
        kind: fault.kind,
        fault: fault.what,
        means,
        remedy,
        timeline: fault.wal.map(|span| span.timeline.0),
        from_lsn: fault.wal.map(|span| span.from),
        to_lsn: fault.wal.map(|span| span.to),
        backup: fault.backup.map(|id| id.to_string()),
        known_since: fault.known_since,
    }
}

const COLUMNS: [&str; 9] =
    ["REPOSITORY", "CLUSTER", "LINEAGE", "MODE", "OBJECTS", "SEGMENTS READ", "VOLUMES READ", "READ", "FAULTS"];

fn print(answer: &Answer) {
    for one in &answer.repositories {
        for fault in &one.faults {
            let known =
                fault.known_since.map_or(String::new(), |at| format!(" (known since {})", at.strftime("%F %TZ")));
            output::text(&format!("{}: {}: {}{known}", one.repository, fault.object, fault.fault));
            output::text(&format!("    means: {}", fault.means));
            output::text(&format!("    do: {}", fault.remedy));
        }
    }
    if !answer.repositories.is_empty() {
        let mut table = output::table(&COLUMNS);
        for one in &answer.repositories {
            let counts = &one.counts;
            table.add_row([
                one.repository.clone(),
                one.cluster.clone(),
                one.lineage.clone(),
                one.mode.to_string(),
                counts.objects.to_string(),
                format!("{} of {}", counts.segments_read, counts.segments),
                format!("{} of {}", counts.volumes_read, counts.volumes),
                output::size(counts.bytes),
                one.faults.len().to_string(),
            ]);
        }
        output::text(&table.to_string());
    }
    for one in &answer.repositories {
        one.remarks().iter().for_each(|remark| output::text(&format!("{}: {remark}", one.repository)));
    }
    for unread in &answer.unread {
        let hint = unread.hint.as_ref().map(|hint| format!(" ({hint})")).unwrap_or_default();
        let (repository, cluster, error) = (&unread.repository, &unread.cluster, &unread.error);
        output::text(&format!("repository {repository} of cluster {cluster} could not be examined: {error}{hint}"));
    }
}

impl Examined {
    fn remarks(&self) -> Vec<String> {
        let mut remarks = self.notes.clone();
        if self.counts.unexamined > 0 {
            let count = self.counts.unexamined;
            remarks.push(format!(
                "{count} objects are encrypted: content not examined, stored bytes only (identity_file is not at hand)"
            ));
        }
        if self.unknown_count > 0 {
            let more = self.unknown_count - self.unknown.len() as u64;
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            remarks.push(format!("unknown, left alone: {}{more}", self.unknown.join(", ")));
        }
        if let Some(why) = &self.unrecorded {
            remarks.push(format!("the ledger was told nothing: {why}"));
        }
        if !self.complete {
            remarks.push("not all of it was examined".to_string());
        }
        remarks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_beside_the_table() {
        let mut one = Examined {
            repository: "local".into(),
            cluster: "main".into(),
            lineage: "7".into(),
            mode: Mode::Full,
            complete: true,
            started: Timestamp::UNIX_EPOCH,
            finished: None,
            resumed: None,
            counts: Counts::default(),
            faults: Vec::new(),
            notes: Vec::new(),
            unknown: vec!["x".into()],
            unknown_count: 3,
            unrecorded: None,
        };
        assert_eq!(one.remarks(), ["unknown, left alone: x and 2 more"]);
        (one.unknown_count, one.counts.unexamined, one.complete) = (0, 4, false);
        let remarks = one.remarks().join("\n");
        assert!(remarks.contains("content not examined") && remarks.contains("not all of it"), "{remarks}");
        let progress = Progress { is_reading: true, done: 1024, total: 2048, faults: 2 };
        assert!(line("local", &progress).contains("1.0 KiB of 2.0 KiB") && step(&progress).phase == "reading");
    }
}
