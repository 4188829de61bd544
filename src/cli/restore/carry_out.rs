//! Owns: handing a plan to `restore/execute` as it was typed, how far it is, and what it ends with in words and JSON.
//! Does not own: what is done (`restore/execute`), the plan (`restore.rs`).

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::sync::watch;

use crate::cli::args::{Global, RestoreArgs};
use crate::cli::progress::{Shown, Step};
use crate::cli::{output, setup};
use crate::error::{ExitCode, Failure};
use crate::restore::execute::{self, ExecuteOptions, Mapping, RestoreError, RestoreProgress, Restored};
use crate::restore::plan::RestorePlan;
use crate::restore::wal_get::Holder;
use crate::secret::Secret;

/// Settings may come by the environment of whoever restores; the server's has none of them.
const VARIABLES: &str = "SEAWALL__";

/// What came of it.
#[derive(Debug)]
pub enum Carried {
    Out,
    /// Something it needs began to be deleted between the plan and its pin; nothing was written.
    Overtaken(Failure),
}

pub async fn carry_out(
    global: &Global,
    args: &RestoreArgs,
    plan: &RestorePlan,
    holders: &[Holder],
) -> Result<Carried, Failure> {
    let config = setup::config_path(global)?;
    let options = options(global, args, plan, config.as_deref())?;
    let (progress, watching) = watch::channel(RestoreProgress::default());
    let shown = Shown::new(global);
    let started = Instant::now();
    let restored = tokio::select! {
        restored = execute::execute(plan, holders, &options, progress) => restored,
        () = shown.follow(watching, step, line) => unreachable!("it follows for as long as it is asked to"),
    };
    drop(shown);
    let mut restored = match restored {
        Err(error @ RestoreError::Overtaken { .. }) => return Ok(Carried::Overtaken(error.into())),
        restored => restored?,
    };
    restored.remarks.extend(unreachable_config(config.as_deref(), &restored.pgdata));
    match global.json {
        true => output::json(&ShownRestored::of(plan, &restored, started.elapsed())),
        false => output::text(&in_words(plan, &restored, started.elapsed())),
    }
    Ok(Carried::Out)
}

fn options(
    global: &Global,
    args: &RestoreArgs,
    plan: &RestorePlan,
    config: Option<&Path>,
) -> Result<ExecuteOptions, Failure> {
    let usage = |message: &str| Failure::new(ExitCode::Usage, message);
    let mapping = |text: &String| {
        let (old, new) = text.split_once('=')?;
        Some(Mapping { old: PathBuf::from(old), new: PathBuf::from(new) })
    };
    let mappings: Option<Vec<Mapping>> = args.tablespace.iter().map(mapping).collect();
    Ok(ExecuteOptions {
        pgdata: args.pgdata.clone().ok_or_else(|| usage("--pgdata says where the data directory goes"))?,
        delta: args.delta,
        owner: args.owner.as_deref().map(execute::parse_owner).transpose()?,
        tablespaces: mappings.ok_or_else(|| usage("--tablespace takes OLD=NEW: two absolute paths"))?,
        primary_conninfo: args.primary_conninfo.clone().map(Secret::new),
        jobs: args.jobs.map(usize::from),
        seawall: words(global, plan, config)?,
        host: setup::host_name(),
    })
}

/// How the recovering server runs this program and tells it where the archive is.
fn words(global: &Global, plan: &RestorePlan, config: Option<&Path>) -> Result<Vec<String>, Failure> {
    let text = |path: &Path| {
        path.to_str().map(str::to_string).ok_or_else(|| {
            let message = format!("{} is no text, and would have to stand in a setting", path.display());
            Failure::new(ExitCode::Usage, message)
        })
    };
    let program = std::env::current_exe().map_err(|error| {
        let message = format!("could not tell where this program is: {error}");
        Failure::new(ExitCode::Unavailable, message).hint("restore_command needs its absolute path")
    })?;
    let mut words = vec![text(&program)?];
    if let Some(path) = config {
        words.extend(["--config".to_string(), text(&std::path::absolute(path).unwrap_or(path.to_path_buf()))?]);
    }
    if let Some(url) = &global.repository {
        words.extend(["--repository".to_string(), url.clone()]);
    }
    words.extend(["--cluster".to_string(), plan.lineage.cluster.clone()]);
    Ok(words)
}

/// What the server's own user will not find when it asks for WAL.
fn unreachable_config(config: Option<&Path>, pgdata: &Path) -> Vec<String> {
    let mut remarks = Vec::new();
    if std::env::vars_os().any(|(name, _)| name.to_string_lossy().starts_with(VARIABLES)) {
        remarks.push(format!(
            "settings came by {VARIABLES}… variables, which the server does not have: put them into the configuration file"
        ));
    }
    let (Some(config), Ok(owner)) = (config, std::fs::metadata(pgdata)) else { return remarks };
    let readable = std::fs::metadata(config).is_ok_and(|file| {
        let class = match (file.uid() == owner.uid(), file.gid() == owner.gid()) {
            (true, _) => 0o400,
            (false, true) => 0o040,
            (false, false) => 0o004,
        };
        file.mode() & class != 0
    });
    if !readable && owner.uid() != 0 {
        remarks.push(format!(
            "{} cannot be read by user {}, as whom the server runs: recovery needs it",
            config.display(),
            owner.uid()
        ));
    }
    remarks
}

#[derive(Serialize)]
struct ShownRestored<'a> {
    restore: String,
    pgdata: String,
    backup: String,
    timeline: u32,
    target: String,
    files: u64,
    kept_files: u64,
    bytes: u64,
    seconds: f64,
    pinned: bool,
    start_command: &'a str,
    remarks: &'a [String],
}

impl<'a> ShownRestored<'a> {
    fn of(plan: &RestorePlan, restored: &'a Restored, elapsed: Duration) -> ShownRestored<'a> {
        ShownRestored {
            restore: restored.id.to_string(),
            pgdata: restored.pgdata.display().to_string(),
            backup: plan.backup().id.to_string(),
            timeline: plan.timeline().0,
            target: plan.target.to_string(),
            files: restored.files,
            kept_files: restored.kept_files,
            bytes: restored.bytes,
            seconds: (elapsed.as_secs_f64() * 1000.0).round() / 1000.0,
            pinned: restored.pinned,
            start_command: &restored.start_command,
            remarks: &restored.remarks,
        }
    }
}

fn in_words(plan: &RestorePlan, restored: &Restored, elapsed: Duration) -> String {
    let (files, bytes, kept) = (restored.files, output::size(restored.bytes), restored.kept_files);
    let kept = if kept > 0 { format!(", {kept} kept as they were") } else { String::new() };
    let mut text = format!(
        "restored {files} files ({bytes} fetched{kept}) to {} in {:.1} s\n",
        restored.pgdata.display(),
        elapsed.as_secs_f64()
    );
    for remark in restored.remarks.iter().filter(|remark| !plan.remarks.contains(remark)) {
        text.push_str(&format!("note: {remark}\n"));
    }
    text.push_str(&format!("start it:\n  {}\n", restored.start_command));
    text
}

fn step(now: &RestoreProgress) -> Step {
    Step { phase: now.phase.word(), done: now.bytes_done, total: now.bytes_total }
}

fn line(now: &RestoreProgress, elapsed: Duration) -> String {
    let phase = now.phase.word();
    let (done, total) = (now.bytes_done, now.bytes_total);
    if total == 0 {
        return phase.to_string();
    }
    let rate = done as f64 / elapsed.as_secs_f64().max(0.001);
    let left = match done {
        0 => String::new(),
        _ => {
            format!(", {}/s, {:.0} s left", output::size(rate as u64), (total - done.min(total)) as f64 / rate.max(1.0))
        }
    };
    format!("{phase}: {} of {}{left}", output::size(done), output::size(total))
}
