//! Owns: `expire`: what retention keeps and removes in each repository and why, as table or JSON; with `--apply`, that it is
//! done and what it freed.
//! Does not own: what goes (`retention`), how it is done (`retention/apply.rs`, `agent/expire.rs`).

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::args::{ExpireArgs, Global};
use super::repositories::{self, Look};
use super::{Verdict, output, setup};
use crate::agent::backup::Place;
use crate::agent::expire::{self, Errand};
use crate::catalog::Archive;
use crate::config::{ArchiveConfig, Location};
use crate::error::{ExitCode, Failure};
use crate::receiver::Clock;
use crate::repository::layout::Lineage;
use crate::retention::apply::{self, ExpireProgress, Freed, Locked};
use crate::retention::plan::Outcome;
use crate::retention::{Fate, Plan, Policy};

#[derive(Debug, Default, Serialize)]
struct Answer {
    repositories: Vec<ShownPlan>,
    /// What could not be planned, or not be done.
    failures: Vec<ShownFailure>,
}

/// One lineage in one repository.
#[derive(Debug, Serialize)]
struct ShownPlan {
    repository: String,
    cluster: String,
    lineage: String,
    /// In words; `null`: nothing is configured.
    policy: Option<String>,
    backups: Vec<ShownBackup>,
    wal: Vec<ShownWal>,
    indexes: Vec<ShownObject>,
    debris: Vec<ShownDebris>,
    notes: Vec<String>,
    kept: Sum,
    removed: Sum,
    /// `null`: it was only planned.
    freed: Option<ShownFreed>,
    locked: Vec<ShownLocked>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
struct Sum {
    bytes: u64,
    objects: u64,
}

impl Sum {
    fn add(&mut self, bytes: u64, objects: u64) {
        self.bytes = self.bytes.saturating_add(bytes);
        self.objects = self.objects.saturating_add(objects);
    }
}

#[derive(Debug, Serialize)]
struct ShownBackup {
    id: String,
    state: &'static str,
    fate: &'static str,
    reasons: Vec<String>,
    bytes: u64,
    objects: u32,
}

#[derive(Debug, Serialize)]
struct ShownWal {
    timeline: u32,
    first: String,
    last: String,
    fate: &'static str,
    reasons: Vec<String>,
    segments: u64,
    bytes: u64,
    objects: u64,
}

#[derive(Debug, Serialize)]
struct ShownObject {
    object: String,
    bytes: u64,
}

#[derive(Debug, Serialize)]
struct ShownDebris {
    kind: &'static str,
    objects: Vec<ShownObject>,
    bytes: u64,
}

#[derive(Debug, Serialize)]
struct ShownFreed {
    bytes: u64,
    objects: u64,
    backups: u64,
    segments: u64,
}

#[derive(Debug, Serialize)]
struct ShownLocked {
    object: String,
    bytes: u64,
    cause: String,
}

#[derive(Debug, Serialize)]
struct ShownFailure {
    repository: String,
    cluster: String,
    error: String,
    hint: Option<String>,
    exit_code: u8,
}

pub fn run(global: &Global, args: &ExpireArgs) -> Result<Verdict, Failure> {
    let chosen = setup::chosen_archives(global)?;
    let roots = chosen.iter().map(|config| config.repositories.len()).sum();
    let (answer, worst) = setup::block_on_threads(setup::threads_for_roots(roots), async {
        let stop = CancellationToken::new();
        tokio::spawn(stop_by_signal(stop.clone()));
        expire(&chosen, args, &stop).await
    })??;
    match global.json {
        true => output::json(&answer),
        false => print(&answer, args.apply, global.verbose > 0),
    }
    worst.map_or(Ok(Verdict::Fine), Err)
}

/// Between two batches; a second one ends at once, as a crash would. The next run goes on.
async fn stop_by_signal(stop: CancellationToken) {
    let (Ok(mut terminate), Ok(mut interrupt)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return;
    };
    for is_first in [true, false] {
        let code = tokio::select! {
            _ = terminate.recv() => 143,
            _ = interrupt.recv() => 130,
        };
        if !is_first {
            std::process::exit(code);
        }
        stop.cancel();
    }
}

async fn expire(
    archives: &[ArchiveConfig],
    args: &ExpireArgs,
    stop: &CancellationToken,
) -> Result<(Answer, Option<Failure>), Failure> {
    let mut answer = Answer::default();
    let mut worst: Option<Failure> = None;
    if let Some(name) = &args.only
        && !archives.iter().flat_map(|config| &config.repositories).any(|repository| repository.name == *name)
    {
        return Err(Failure::new(ExitCode::Usage, format!("no repository is called {name}"))
            .hint("--only takes the name of a [repositories.NAME] that the cluster uses"));
    }
    for config in archives {
        let looks = repositories::look(&config.repositories, &config.cluster).await;
        for look in looks.iter().filter(|look| args.only.as_ref().is_none_or(|name| look.config.name == *name)) {
            if let Err(failure) = expire_in(config, look, args, stop, &mut answer).await {
                answer.failures.push(ShownFailure {
                    repository: look.config.name.clone(),
                    cluster: config.cluster.clone(),
                    error: failure.message.clone(),
                    hint: failure.hint.clone(),
                    exit_code: failure.exit_code as u8,
                });
                let named = failure.context(format_args!("repository {}", look.config.name));
                worst.get_or_insert(named);
            }
        }
    }
    Ok((answer, worst))
}

/// Every lineage of one cluster in one repository; the newest first, whose backups may be what lets an earlier one go.
async fn expire_in(
    config: &ArchiveConfig,
    look: &Look,
    args: &ExpireArgs,
    stop: &CancellationToken,
    answer: &mut Answer,
) -> Result<(), Failure> {
    let found = look.readable()?;
    let Some((newest, _)) = found.lineages.last() else {
        return Err(repositories::nothing(std::slice::from_ref(look), &config.cluster));
    };
    let id = found.file.as_ref().map(|file| file.id.clone()).unwrap_or_default();
    let policy = config.retention.policy.as_ref();
    if args.apply && policy.is_some() {
        refuse_beside_single_writer(look)?;
    }
    for (lineage, _) in found.lineages.iter().rev() {
        let archive = look.archive(lineage);
        let above: Option<Archive> = (lineage != newest).then(|| look.archive(newest));
        let shown = match policy.filter(|_| args.apply) {
            Some(policy) => {
                let place = Place { index: 0, name: look.config.name.clone(), id: id.clone(), archive };
                let errand = Errand {
                    policy: policy.clone(),
                    host: setup::host_name(),
                    purpose: "`seawall expire`".to_string(),
                    clock: Clock::system(),
                    stop: stop.clone(),
                };
                let random = || fastrand::u64(..);
                let progress = watch::Sender::new(ExpireProgress::default());
                let expiry = expire::in_place(&errand, &place, above, &random, progress).await?;
                shown(look, lineage, Some(policy), &expiry.plan, Some((expiry.freed, &expiry.locked)))
            }
            None => {
                let nothing = Policy::default();
                let rules = policy.unwrap_or(&nothing);
                let (_, plan) = apply::make_plan(&archive, above.as_ref(), rules, Timestamp::now()).await?;
                shown(look, lineage, policy, &plan, None)
            }
        };
        answer.repositories.push(shown);
    }
    Ok(())
}

/// A store without conditional writes cannot keep two apart: no lease on it means anything.
fn refuse_beside_single_writer(look: &Look) -> Result<(), Failure> {
    match &look.config.location {
        Location::S3(options) if options.single_writer => {
            let message =
                format!("repository {} has single_writer = true: only the agent expires there", look.config.name);
            Err(Failure::new(ExitCode::Config, message).hint(
                "the agent expires after each good backup (retention.automatic); without --apply this shows the plan",
            ))
        }
        _ => Ok(()),
    }
}

fn shown(
    look: &Look,
    lineage: &Lineage,
    policy: Option<&Policy>,
    plan: &Plan,
    done: Option<(Freed, &[Locked])>,
) -> ShownPlan {
    let (mut kept, mut removed) = (Sum::default(), Sum::default());
    let mut sum = |fate: Fate, bytes: u64, objects: u64| match fate {
        Fate::Remove => removed.add(bytes, objects),
        Fate::Keep | Fate::TakeBack => kept.add(bytes, objects),
    };
    plan.backups.iter().for_each(|it| sum(it.fate, it.bytes, u64::from(it.objects)));
    plan.wal.iter().for_each(|it| sum(it.fate, it.bytes, it.objects));
    plan.indexes.iter().for_each(|it| sum(Fate::Remove, it.bytes, 1));
    plan.debris.iter().for_each(|it| sum(Fate::Remove, it.bytes, 1));
    let mut debris: BTreeMap<_, Vec<ShownObject>> = BTreeMap::new();
    for it in &plan.debris {
        debris.entry(it.kind).or_default().push(ShownObject { object: it.key.to_string(), bytes: it.bytes });
    }
    ShownPlan {
        repository: look.config.name.clone(),
        cluster: lineage.cluster.clone(),
        lineage: lineage.directory_name(),
        policy: policy.map(Policy::to_string),
        backups: plan.backups.iter().map(shown_backup).collect(),
        wal: plan.wal.iter().map(shown_wal).collect(),
        indexes: plan
            .indexes
            .iter()
            .map(|it| ShownObject { object: lineage.index(it.name).to_string(), bytes: it.bytes })
            .collect(),
        debris: debris
            .into_iter()
            .map(|(kind, objects)| {
                let bytes = objects.iter().map(|object| object.bytes).sum();
                ShownDebris { kind: kind.words(), objects, bytes }
            })
            .collect(),
        notes: plan.notes.clone(),
        kept,
        removed,
        freed: done.map(|(freed, _)| {
            let Freed { bytes, objects, backups, segments } = freed;
            ShownFreed { bytes, objects, backups, segments }
        }),
        locked: done.map_or(Vec::new(), |(_, locked)| locked.iter().map(shown_locked).collect()),
    }
}

fn shown_backup(it: &crate::retention::BackupVerdict) -> ShownBackup {
    let state = match it.outcome {
        Outcome::Complete => "complete",
        Outcome::Broken => "broken",
        Outcome::Running => "running",
        Outcome::Abandoned => "failed",
        Outcome::Expiring => "expiring",
        Outcome::Unknown => "unknown",
    };
    let (reasons, bytes, objects) = (it.reasons.clone(), it.bytes, it.objects);
    ShownBackup { id: it.id.to_string(), state, fate: word(it.fate), reasons, bytes, objects }
}

fn shown_wal(it: &crate::retention::WalVerdict) -> ShownWal {
    ShownWal {
        timeline: it.timeline.0,
        first: it.first.to_string(),
        last: it.last.to_string(),
        fate: word(it.fate),
        reasons: it.reasons.clone(),
        segments: it.segments,
        bytes: it.bytes,
        objects: it.objects,
    }
}

fn shown_locked(it: &Locked) -> ShownLocked {
    ShownLocked { object: it.key.to_string(), bytes: it.bytes, cause: it.cause.clone() }
}

fn word(fate: Fate) -> &'static str {
    match fate {
        Fate::Keep => "keep",
        Fate::TakeBack => "take back",
        Fate::Remove => "remove",
    }
}

fn print(answer: &Answer, applied: bool, is_verbose: bool) {
    for plan in &answer.repositories {
        print_plan(plan, is_verbose);
    }
    for ShownFailure { repository, cluster, error, hint, .. } in &answer.failures {
        let hint = hint.as_ref().map(|hint| format!(" ({hint})")).unwrap_or_default();
        let what = if applied { "nothing more is deleted" } else { "cannot be planned" };
        output::text(&format!("repository {repository} of cluster {cluster}: {what}: {error}{hint}"));
    }
}

fn print_plan(plan: &ShownPlan, is_verbose: bool) {
    output::text(&format!("cluster {}, lineage {}, repository {}", plan.cluster, plan.lineage, plan.repository));
    match &plan.policy {
        Some(policy) => output::text(&format!("retention: {policy}")),
        None => output::text("retention: nothing is configured, nothing is ever removed"),
    }
    let mut table = output::table(&["FATE", "WHAT", "SIZE", "OBJECTS", "WHY"]);
    let mut row = |fate: &str, what: String, bytes: u64, objects: u64, why: String| {
        table.add_row([fate.to_string(), what, output::size(bytes), objects.to_string(), why]);
    };
    for it in &plan.backups {
        let state = if it.state == "complete" { String::new() } else { format!(" ({})", it.state) };
        row(it.fate, format!("{}{state}", it.id), it.bytes, u64::from(it.objects), it.reasons.join("; "));
    }
    for it in &plan.wal {
        let what = match it.segments {
            1 => it.first.clone(),
            n => format!("{} to {} ({n} segments)", it.first, it.last),
        };
        row(it.fate, what, it.bytes, it.objects, it.reasons.join("; "));
    }
    if !plan.indexes.is_empty() {
        let bytes = plan.indexes.iter().map(|it| it.bytes).sum();
        let why = "all that they describe is removed".to_string();
        row("remove", "index files".to_string(), bytes, plan.indexes.len() as u64, why);
    }
    for it in &plan.debris {
        row("remove", it.kind.to_string(), it.bytes, it.objects.len() as u64, "nothing looks at them".to_string());
    }
    output::text(&table.to_string());
    if is_verbose {
        let all = plan.indexes.iter().chain(plan.debris.iter().flat_map(|it| &it.objects));
        all.for_each(|it| output::text(&format!("remove  {}  {}", it.object, output::size(it.bytes))));
    }
    plan.notes.iter().for_each(|note| output::text(&format!("note: {note}")));
    let sum = |sum: &Sum| format!("{} in {} objects", output::size(sum.bytes), sum.objects);
    output::text(&format!("keeps {}; removes {}", sum(&plan.kept), sum(&plan.removed)));
    if let Some(freed) = &plan.freed {
        let ShownFreed { bytes, objects, backups, segments } = freed;
        output::text(&format!(
            "deleted {backups} backups, {segments} WAL segments, {objects} objects: {} freed",
            output::size(*bytes)
        ));
    } else if plan.policy.is_some() && plan.removed != Sum::default() {
        output::text("nothing was deleted: `seawall expire --apply` does it");
    }
    if let Some(first) = plan.locked.first() {
        let bytes = plan.locked.iter().map(|it| it.bytes).sum();
        output::text(&format!(
            "the store keeps {} objects ({}) of those, to be tried again: {}: {}",
            plan.locked.len(),
            output::size(bytes),
            first.object,
            first.cause
        ));
    }
    if is_verbose {
        plan.locked
            .iter()
            .skip(1)
            .for_each(|it| output::text(&format!("kept by the store  {}: {}", it.object, it.cause)));
    }
}
