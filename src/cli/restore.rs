//! Owns: `restore`: what was asked for, the plan of it in words and JSON, and why a target is refused.
//! Does not own: choosing (`restore/choose.rs`), carrying it out (`restore/execute`).

mod carry_out;
mod shown;

use jiff::Timestamp;

use super::args::{Global, RestoreArgs};
use super::repositories::{self, Look};
use super::restorable::{self, Restorable};
use super::{Verdict, keys, output, server, setup};
use crate::archiver::Workers;
use crate::codec::encrypt::Keys;
use crate::config::ArchiveConfig;
use crate::error::{ExitCode, Failure};
use crate::repository::layout::Lineage;
use crate::restore::choose::{self, Chosen, Circumstances, Refusal, ServerEnd, Unchosen};
use crate::restore::plan::RestorePlan;
use crate::restore::search::ArchiveSearch;
use crate::restore::target::{self, Target, TargetError, TimelineChoice, Wish};
use crate::restore::wal_get::Holder;
use carry_out::Carried;
use shown::ShownPlan;

pub fn run(global: &Global, args: &RestoreArgs) -> Result<Verdict, Failure> {
    let wish = wish(args)?;
    let archives = setup::archives(global)?;
    let config = ArchiveConfig::choose(&archives, global.cluster.as_deref())?;
    let keys = keys::reading(config.identity_file.as_deref())?;
    setup::block_on(async {
        let mut is_first = true;
        loop {
            let (plan, holders) = make_plan(global, args, config, &keys, &wish).await?;
            let shown = ShownPlan::of(&plan);
            match (args.plan, global.json) {
                (true, true) => output::json(&shown),
                (true, false) => output::text(&shown.to_text()),
                (false, _) => output::note(shown.to_text()),
            }
            if args.plan {
                return Ok(Verdict::Fine);
            }
            match carry_out::carry_out(global, args, &plan, &holders).await? {
                Carried::Out => return Ok(Verdict::Fine),
                Carried::Overtaken(why) if is_first => output::note(format_args!("{why}: planning anew")),
                Carried::Overtaken(why) => return Err(why),
            }
            is_first = false;
        }
    })?
}

fn wish(args: &RestoreArgs) -> Result<Wish, Failure> {
    let usage = |error: TargetError| Failure::new(ExitCode::Usage, error.to_string()).hint(error.hint());
    let zone = args.tz.as_deref().map(target::parse_zone).transpose().map_err(usage)?;
    Ok(Wish {
        target: Target::parse(&args.to, zone.as_ref()).map_err(usage)?,
        exclusive: args.exclusive,
        timeline: args.timeline,
        action: args.action.into(),
        standby: args.standby,
    })
}

/// Decides everything, and names the repositories that it will be carried out with, the preferred one first.
async fn make_plan(
    global: &Global,
    args: &RestoreArgs,
    config: &ArchiveConfig,
    keys: &Keys,
    wish: &Wish,
) -> Result<(RestorePlan, Vec<Holder>), Failure> {
    let nearest = repositories::nearest_first(&config.repositories);
    let looks = repositories::look(&nearest, &config.cluster).await;
    let lineage = lineage(&looks, &config.cluster, args.lineage.as_deref())?;
    let found = restorable::read(&looks, &lineage).await?;
    let holders: Vec<Holder> = looks
        .iter()
        .filter(|look| look.file_of(&lineage).is_some())
        .map(|look| Holder::new(&look.config.name, look.archive(&lineage).with_keys(keys.clone())))
        .collect();
    let search =
        ArchiveSearch { holders: holders.clone(), system_id: lineage.system_id, segment_size: found.held.segment_size };
    let reach = found.reach();
    let mut circumstances = Circumstances { now: Timestamp::now(), backup: args.backup, server: None };
    let mut chosen = choose::choose(&reach, &search, wish, circumstances).await;
    // An idle server knows that nothing is missing; one that does not answer leaves it at that.
    let is_past = |time: Timestamp| time <= circumstances.now;
    if matches!((&chosen, &wish.target), (Err(Unchosen::Refused(_)), Target::Time(time)) if is_past(*time)) {
        circumstances.server = server_end(global, &lineage).await;
        if circumstances.server.is_some() {
            chosen = choose::choose(&reach, &search, wish, circumstances).await;
        }
    }
    let chosen = chosen.map_err(|unchosen| unchosen_failure(unchosen, &found))?;
    Ok((plan(lineage, &found, wish, chosen), holders))
}

/// The one that is named, else the newest.
pub fn lineage(looks: &[Look], cluster: &str, name: Option<&str>) -> Result<Lineage, Failure> {
    let lineages = repositories::all_lineages(looks);
    let names = || lineages.iter().map(|(lineage, _)| lineage.directory_name()).collect::<Vec<_>>().join(", ");
    let chosen = match name {
        None => lineages.last(),
        Some(name) if lineages.is_empty() || lineages.iter().any(|(it, _)| it.directory_name() == name) => {
            lineages.iter().find(|(lineage, _)| lineage.directory_name() == name)
        }
        Some(name) => {
            return Err(Failure::new(ExitCode::Usage, format!("there is no lineage {name} of cluster {cluster}"))
                .hint(format!("there are: {}", names())));
        }
    };
    chosen.map(|(lineage, _)| lineage.clone()).ok_or_else(|| repositories::nothing(looks, cluster))
}

/// Where the server's WAL ends now, if there is one that says so and is of this lineage.
async fn server_end(global: &Global, lineage: &Lineage) -> Option<ServerEnd> {
    let cluster = setup::cluster(global).ok()?;
    let slot = setup::slot_name(&cluster).ok()?;
    let facts = server::ask(&setup::world(&cluster, Workers::inline()), &slot).await.ok()?;
    let is_ours = facts.system_id == Some(lineage.system_id);
    is_ours.then_some(ServerEnd { timeline: facts.timeline?, lsn: facts.flush_lsn?, at: facts.now? })
}

fn unchosen_failure(unchosen: Unchosen, found: &Restorable) -> Failure {
    match unchosen {
        Unchosen::Usage(message) => Failure::new(ExitCode::Usage, message),
        Unchosen::Failed(error) => error.into(),
        Unchosen::Refused(Refusal { message, nearest }) => {
            let unread = found.unread.iter().map(|unread| {
                format!("; repository {} cannot be read, and may hold more: {}", unread.repository, unread.failure)
            });
            let message = format!("{message}{}", unread.collect::<String>());
            let nearest: Vec<String> =
                nearest.iter().map(|it| format!("{}: seawall restore {}", it.what, it.arguments)).collect();
            let hint = match nearest.is_empty() {
                true => "`seawall window` shows what can be restored, `seawall list` the backups".to_string(),
                false => nearest.join("\n      "),
            };
            Failure::new(ExitCode::Finding, message).hint(hint)
        }
    }
}

fn plan(lineage: Lineage, found: &Restorable, wish: &Wish, chosen: Chosen) -> RestorePlan {
    let unread = found.unread.iter().map(|unread| {
        format!("repository {} cannot be read, and may hold more: {}", unread.repository, unread.failure)
    });
    RestorePlan {
        system_id: lineage.system_id,
        lineage,
        segment_size: found.held.segment_size,
        follow: wish.standby && wish.timeline == TimelineChoice::Latest,
        standby: wish.standby,
        target: wish.target.clone(),
        inclusive: !wish.exclusive,
        action: wish.action,
        start_lsn: chosen.backup.start_lsn,
        consistent_lsn: chosen.backup.stop_lsn,
        copies: chosen.backup.copies,
        path: chosen.path,
        stop: chosen.stop,
        stop_at: chosen.stop_at,
        end_lsn: chosen.end_lsn,
        end_time: chosen.end_time,
        replay: chosen.replay,
        remarks: chosen.remarks.into_iter().chain(unread).collect(),
    }
}
