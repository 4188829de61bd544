//! Owns: what can be typed, and its help.
//! Does not own: what it means (the verbs).

use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use jiff::Timestamp;

use crate::catalog::events::EventKind;
use crate::config::{Flags, label_fault, parse_duration, parse_size};
use crate::repository::layout::BackupId;
use crate::restore::marker::RestoreId;
use crate::restore::target::{Action, TimelineChoice};
use crate::telemetry::{LogFormat, Verbosity};
use crate::wal::{Lsn, Place, SegmentName, TimelineId};

const AFTER_HELP: &str = "\
Without --config the configuration is SEAWALL_CONFIG, seawall.toml, or /etc/seawall/seawall.toml, whichever comes first;
without any file, --postgres, --repository and --slot describe one cluster called main.

Exit codes: 0 success, 1 a finding (gap, fault, not protected), 64 usage, 65 conflicting or bad data, 69 server or
store unavailable, 70 a bug, 75 try again, 77 permission, 78 configuration. wal-get: 0 delivered, 1 not in the archive
(proven), 255 every error.";

/// Archives PostgreSQL's WAL as it is written, and proves every record before it acknowledges it.
#[derive(Debug, Parser)]
#[command(name = "seawall", version, after_help = AFTER_HELP, max_term_width = 120, disable_help_subcommand = false)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Everywhere")]
pub struct Global {
    /// The configuration file
    #[arg(long, value_name = "FILE", global = true)]
    pub config: Option<PathBuf>,
    /// The cluster; may be left out where there is one
    #[arg(long, value_name = "NAME", global = true)]
    pub cluster: Option<String>,
    /// The server: a libpq connection string or URI
    #[arg(long, value_name = "CONNINFO", global = true)]
    pub postgres: Option<String>,
    /// The repository: file:///absolute/path or s3://bucket/prefix
    #[arg(long, value_name = "URL", global = true)]
    pub repository: Option<String>,
    /// The replication slot
    #[arg(long, value_name = "NAME", global = true)]
    pub slot: Option<String>,
    /// Answer in JSON, errors too
    #[arg(long, global = true)]
    pub json: bool,
    /// How log lines look
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t, global = true)]
    pub log_format: LogFormatArg,
    /// Say more (twice: everything)
    #[arg(short, long, action = ArgAction::Count, global = true)]
    pub verbose: u8,
    /// Say less
    #[arg(short, long, action = ArgAction::Count, global = true)]
    pub quiet: u8,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub enum LogFormatArg {
    #[default]
    Text,
    Json,
}

impl From<LogFormatArg> for LogFormat {
    fn from(format: LogFormatArg) -> LogFormat {
        match format {
            LogFormatArg::Text => LogFormat::Text,
            LogFormatArg::Json => LogFormat::Json,
        }
    }
}

impl Global {
    pub fn flags(&self) -> Flags {
        Flags {
            cluster: self.cluster.clone(),
            postgres: self.postgres.clone(),
            repository_url: self.repository.clone(),
            slot: self.slot.clone(),
        }
    }

    pub fn verbosity(&self, base: Verbosity) -> Verbosity {
        base.louder(i32::from(self.verbose) - i32::from(self.quiet))
    }
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// The agent: stream and archive every configured cluster (or --cluster) until SIGTERM or SIGINT
    Run(RunArgs),
    /// See it work: a scratch server streams, the agent crashes, the server is destroyed and recovered
    Demo(DemoArgs),
    /// Print the SQL, pg_hba.conf lines, settings and configuration to use; create the archive with --apply
    Init(InitArgs),
    /// Examine configuration, server, role, slot and repository; every finding with its cure
    Check(CheckArgs),
    /// Per cluster one line that is true: state, loss if the server burned now, slot, gaps
    Status(StatusArgs),
    /// Take a base backup now, beside the agent that streams
    Backup(BackupArgs),
    /// The backups there are
    List(ListArgs),
    /// Keep a backup, whatever retention says
    Pin(PinArgs),
    /// Leave a backup to retention again
    Unpin(PinArgs),
    /// What retention keeps and removes, and why; --apply removes it
    Expire(ExpireArgs),
    /// Every hole in the archive; exit code 1 when one is open
    Gaps(GapsArgs),
    /// What can be restored, to the commit; exit code 1 when nothing can
    Window(WindowArgs),
    /// When did it happen: drops, truncations, restore points, commits; each with the restore that stops just before it
    Find(FindArgs),
    /// Examine what the repositories hold; exit code 1 when anything is wrong with it
    Verify(VerifyArgs),
    /// Bring a server back, to any instant: choose, fetch and verify a backup, and set up its recovery
    Restore(RestoreArgs),
    /// Fetch one WAL or history file: the restore_command ('seawall wal-get %f %p')
    WalGet(WalGetArgs),
}

impl Command {
    /// The agent tells what it does; the others speak when something is wrong.
    pub fn base_verbosity(&self) -> Verbosity {
        match self {
            Command::Run(_) | Command::Backup(_) => Verbosity::Info,
            _ => Verbosity::Warn,
        }
    }
}

/// Streams until told to stop. SIGTERM or SIGINT: receive no more, make durable what was received, tell the server,
/// end. A second signal ends at once (exit code 143 or 130); nothing acknowledged is lost by that either.
#[derive(Args, Debug)]
pub struct RunArgs {
    /// End with 0 as soon as everything up to this LSN is durable (for scripts and benchmarks)
    #[arg(long, value_name = "LSN")]
    pub until: Option<Lsn>,
}

/// Needs a complete PostgreSQL (SEAWALL_PG_BIN, target/servers, /usr/lib/postgresql, PATH), touches no other server and
/// no configuration, and takes half a minute. As root everything runs as the user postgres.
#[derive(Args, Debug)]
pub struct DemoArgs {
    /// Leave the recovered copy running and the files in place, and say where
    #[arg(long)]
    pub keep: bool,
}

/// Without options only prints; nothing is connected to or changed.
#[derive(Args, Debug)]
pub struct InitArgs {
    /// Connect, and create what is missing: repository, lineage, slot. Safe to repeat
    #[arg(long)]
    pub apply: bool,
    /// Adopt an existing slot or a promoted server: the archive starts where the slot holds WAL from
    #[arg(long, conflicts_with = "new_lineage")]
    pub create: bool,
    /// Archive this server apart from what the repository holds, in a new lineage
    #[arg(long)]
    pub new_lineage: bool,
}

#[derive(Args, Debug)]
pub struct CheckArgs {}

#[derive(Args, Debug)]
pub struct StatusArgs {}

/// WAL must be streaming to the archive meanwhile (`seawall run`): a backup is complete when the WAL that makes it
/// consistent is archived too. While another process takes a backup of this cluster: exit code 75.
#[derive(Args, Debug)]
pub struct BackupArgs {
    /// What kind; auto takes a full one
    #[arg(long = "type", value_name = "TYPE", value_enum, default_value_t)]
    pub backup_type: BackupTypeArg,
    /// A line of text to know it by
    #[arg(long, value_name = "TEXT", value_parser = label)]
    pub label: Option<String>,
    /// While another backup is taken, wait until it is done
    #[arg(long)]
    pub wait: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum BackupTypeArg {
    #[default]
    Auto,
    Full,
}

#[derive(Args, Debug)]
pub struct ListArgs {
    /// Also those that failed or were interrupted
    #[arg(long)]
    pub all: bool,
}

#[derive(Args, Debug)]
pub struct PinArgs {
    /// Its id, as `seawall list` shows it
    pub backup: String,
}

/// Works from the repositories alone, each by what it holds itself. Without --apply nothing is changed. What others need
/// meanwhile (a running backup or restore, a pin) stays. A run that ends early is continued by the next. Exit codes: 75
/// while somebody takes a backup or expires, 77 without the right to delete.
#[derive(Args, Debug)]
pub struct ExpireArgs {
    /// Do it
    #[arg(long)]
    pub apply: bool,
    /// In this repository only
    #[arg(long, value_name = "REPOSITORY")]
    pub only: Option<String>,
}

#[derive(Args, Debug)]
pub struct WindowArgs {}

#[derive(Args, Debug)]
pub struct GapsArgs {
    /// Also write the answer as a page
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
}

/// Reads the index; only the unfinished segment at the end is fetched, and with --around, --commits and --xid the segments
/// that hold the answer (which needs identity_file where they are encrypted). Relations are shown as
/// tablespace/database/file, as pg_relation_filepath() has them: DROP, TRUNCATE and whatever rewrites a table removes a
/// file. A server that answers is asked for names. Exit code 1 when something could not be looked into.
#[derive(Args, Debug)]
pub struct FindArgs {
    /// From then on: 2026-11-22T11:00:00Z, '2026-11-22 12:00:00+01:00', or how long ago: 2h, 3d
    #[arg(long, value_name = "TIME", value_parser = moment)]
    pub since: Option<Timestamp>,
    /// Up to then
    #[arg(long, value_name = "TIME", value_parser = moment)]
    pub until: Option<Timestamp>,
    /// The commits nearest to a time or an LSN, and what happened between them
    #[arg(long, value_name = "TIME|LSN", value_parser = place, conflicts_with_all = ["since", "until", "commits", "xid"])]
    pub around: Option<Place>,
    /// With --since or --until: commits too
    #[arg(long, conflicts_with = "xid")]
    pub commits: bool,
    /// Where this transaction ended
    #[arg(long, value_name = "N", conflicts_with_all = ["since", "until"])]
    pub xid: Option<u32>,
    /// Commits shown: on either side with --around (5), in all with --commits (100)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=10_000))]
    pub count: Option<u16>,
    /// Only these; may be repeated
    #[arg(long, value_name = "KIND", value_enum, value_delimiter = ',')]
    pub kind: Vec<KindArg>,
    /// Only what is about these relations: a path, a file's number, [[database.]schema.]name; * and ? match anything
    #[arg(long, value_name = "PATTERN")]
    pub relation: Option<String>,
    /// Only this line of history: the timeline and its ancestors up to their forks (commits: otherwise the newest line)
    #[arg(long, value_name = "N", value_parser = timeline)]
    pub timeline: Option<TimelineId>,
    /// A directory of the cluster in the repository: <system-id> or <system-id>-<n>
    #[arg(long, value_name = "NAME")]
    pub lineage: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum KindArg {
    /// A commit that removed files: DROP, TRUNCATE, whatever rewrites a table
    Drop,
    /// A file was cut, as VACUUM does
    Truncation,
    DropDatabase,
    DropTablespace,
    RestorePoint,
    Commit,
    Rollback,
}

impl From<KindArg> for EventKind {
    fn from(kind: KindArg) -> EventKind {
        match kind {
            KindArg::Drop => EventKind::Drop,
            KindArg::Truncation => EventKind::Truncation,
            KindArg::DropDatabase => EventKind::DropDatabase,
            KindArg::DropTablespace => EventKind::DropTablespace,
            KindArg::RestorePoint => EventKind::RestorePoint,
            KindArg::Commit => EventKind::Commit,
            KindArg::Rollback => EventKind::Rollback,
        }
    }
}

/// Works without a server. --repository may name a configured repository: only that one is examined. What is damaged is
/// looked at twice, and then told to the ledger: readers take another copy, and the agent mends it where it can. Exit
/// code 1: a fault was found; 69: a store does not answer, which is none.
#[derive(Args, Debug)]
pub struct VerifyArgs {
    /// What is there against what should be: listings, index, backups; reads no large object (the default)
    #[arg(long, conflicts_with_all = ["sample", "full"])]
    pub quick: bool,
    /// Also read this share of the segments and volumes, chosen at random: 5%
    #[arg(long, value_name = "P%", value_parser = percent, conflicts_with = "full")]
    pub sample: Option<f64>,
    /// Read everything: checksums, the chain of WAL records, every file of every backup. Encrypted objects need
    /// identity_file. Interrupted, the next one goes on from there
    #[arg(long)]
    pub full: bool,
    /// Read no faster than this many bytes a second: 50MiB
    #[arg(long, value_name = "SIZE", value_parser = rate)]
    pub max_rate: Option<u64>,
    /// Begin anew where an earlier --full was interrupted
    #[arg(long, requires = "full")]
    pub restart: bool,
    /// With --sample: which objects; the same number, the same objects
    #[arg(long, value_name = "N", requires = "sample")]
    pub seed: Option<u64>,
    /// Restore into a scratch directory and start it
    #[arg(long, hide = true)]
    pub drill: bool,
}

/// Exit codes: 0 delivered; 1 not in the archive, as the store has shown; 255 every error, so that PostgreSQL stops
/// instead of ending recovery early. Without --lineage: the newest one of the system id in global/pg_control of the
/// current directory, where PostgreSQL runs its restore_command.
#[derive(Args, Debug)]
pub struct WalGetArgs {
    /// %f: the name PostgreSQL asks for
    #[arg(required_unless_present_any = ["prefetch", "restore_end"])]
    pub name: Option<String>,
    /// %p: where to put it
    #[arg(required_unless_present_any = ["prefetch", "restore_end"])]
    pub dest: Option<PathBuf>,
    /// A directory of the cluster in the repository: <system-id> or <system-id>-<n>
    #[arg(long, value_name = "NAME")]
    pub lineage: Option<String>,
    /// This timeline whole, as pg_rewind needs it; otherwise the path to the newest one
    #[arg(long, value_name = "N", value_parser = timeline)]
    pub timeline: Option<TimelineId>,
    /// The restore whose recovery this is: its lineage, path and end count, and WAL is fetched ahead of replay
    #[arg(long, value_name = "ID", conflicts_with_all = ["lineage", "timeline"])]
    pub restore: Option<RestoreId>,
    /// How much WAL is fetched ahead; 0: none
    #[arg(long, value_name = "SIZE", default_value = "256MiB", value_parser = size)]
    pub ahead: u64,
    /// The recovery_end_command: removes what the restore of this ID left in the data directory, lifts its pin
    #[arg(long, value_name = "ID", conflicts_with_all = ["restore", "lineage", "timeline", "name"])]
    pub restore_end: Option<RestoreId>,
    /// Fetch ahead until nobody needs it: what `wal-get` starts
    #[arg(long, hide = true, requires = "restore", conflicts_with = "name")]
    pub prefetch: bool,
    /// What was asked for when it was started
    #[arg(long, hide = true, value_name = "SEGMENT", requires = "prefetch")]
    pub from: Option<SegmentName>,
    /// How long an unavailable store is asked again
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = duration)]
    pub patience: Duration,
}

/// Chooses backup and timelines by itself, and refuses what cannot be reached, naming what can be. A time stops after the
/// last transaction that ended at or before it. Exit code 1: the target cannot be reached.
#[derive(Args, Debug)]
pub struct RestoreArgs {
    /// The data directory to create. It must be empty or absent, unless --delta is given
    #[arg(long, value_name = "DIR", required_unless_present = "plan")]
    pub pgdata: Option<PathBuf>,
    /// latest, immediate, a time with its zone ("2026-11-22 14:05:00+01"), lsn:X/X, xid:N or name:TEXT
    #[arg(long, value_name = "TARGET", default_value = "latest")]
    pub to: String,
    /// The zone of a time that names none, such as Europe/Berlin or +01:00
    #[arg(long, value_name = "ZONE")]
    pub tz: Option<String>,
    /// Only say what would be done
    #[arg(long)]
    pub plan: bool,
    /// Stop just before the target instead of after it
    #[arg(long)]
    pub exclusive: bool,
    /// Which line of history: latest, current (the backup's), or a number
    #[arg(long, value_name = "latest|current|N", default_value = "latest")]
    pub timeline: TimelineChoice,
    /// What the server does at the target
    #[arg(long, value_enum, default_value_t)]
    pub action: ActionArg,
    /// This backup instead of the one that suits best
    #[arg(long, value_name = "BACKUP")]
    pub backup: Option<BackupId>,
    /// A standby: it replays whatever comes, and has no target
    #[arg(long, conflicts_with_all = ["to", "exclusive", "action"])]
    pub standby: bool,
    /// With --standby: the server to stream from as well
    #[arg(long, value_name = "CONNINFO", requires = "standby")]
    pub primary_conninfo: Option<String>,
    /// Put a tablespace elsewhere; may be repeated
    #[arg(long, value_name = "OLD=NEW")]
    pub tablespace: Vec<String>,
    /// Use what is in the directory already: files whose checksum matches are kept, all others replaced or removed
    #[arg(long)]
    pub delta: bool,
    /// As root: whose the files will be (default: the owner of the directory the data directory lies in)
    #[arg(long, value_name = "USER[:GROUP]")]
    pub owner: Option<String>,
    /// Volumes fetched at the same time
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub jobs: Option<u16>,
    /// A directory of the cluster in the repository: <system-id> or <system-id>-<n>; otherwise the newest
    #[arg(long, value_name = "NAME")]
    pub lineage: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub enum ActionArg {
    /// It is a server of its own, on a new timeline
    #[default]
    Promote,
    /// It can be looked at, and waits for pg_wal_replay_resume()
    Pause,
    Shutdown,
}

impl From<ActionArg> for Action {
    fn from(action: ActionArg) -> Action {
        match action {
            ActionArg::Promote => Action::Promote,
            ActionArg::Pause => Action::Pause,
            ActionArg::Shutdown => Action::Shutdown,
        }
    }
}

fn label(text: &str) -> Result<String, String> {
    match label_fault(text) {
        None => Ok(text.to_string()),
        Some(expected) => Err(format!("expected {expected}")),
    }
}

fn timeline(text: &str) -> Result<TimelineId, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err("expected a timeline in decimal, 1 or more".to_string()),
        Ok(number) => Ok(TimelineId(number)),
    }
}

fn moment(text: &str) -> Result<Timestamp, String> {
    let ago = || {
        let span: jiff::SignedDuration = text.trim_end_matches(" ago").parse().ok()?;
        Timestamp::now().checked_sub(span.abs()).ok()
    };
    text.parse().ok().or_else(ago).ok_or_else(|| {
        "expected a time with its zone, such as 2026-11-22T11:00:00Z, or how long ago, such as 2h".to_string()
    })
}

fn place(text: &str) -> Result<Place, String> {
    let time = || moment(text).map(Place::After).map_err(|error| format!("{error}; or an LSN, such as 16/B374D848"));
    text.parse().map(Place::Lsn).or_else(|_| time())
}

fn size(text: &str) -> Result<u64, String> {
    match text {
        "0" => Ok(0),
        text => parse_size(text).ok_or_else(|| "expected a size such as 256MiB, or 0".to_string()),
    }
}

fn percent(text: &str) -> Result<f64, String> {
    let number = text.strip_suffix('%').and_then(|number| number.parse::<f64>().ok());
    match number.filter(|number| *number > 0.0 && *number <= 100.0) {
        Some(number) => Ok(number / 100.0),
        None => Err("expected a share above 0% and up to 100%, such as 5%".to_string()),
    }
}

fn rate(text: &str) -> Result<u64, String> {
    let rate = parse_size(text).filter(|bytes| *bytes > 0);
    rate.ok_or_else(|| "expected a size such as 50MiB, read in a second at most".to_string())
}

fn duration(text: &str) -> Result<Duration, String> {
    parse_duration(text).ok_or_else(|| "expected a duration such as 500ms, 30s or 5min".to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn flags_may_stand_before_and_after_the_verb() {
        for line in ["seawall --cluster a -v run --until 0/10", "seawall run --until 0/10 --cluster a --verbose"] {
            let cli = Cli::try_parse_from(line.split(' ')).unwrap();
            assert_eq!(cli.global.cluster.as_deref(), Some("a"));
            assert_eq!(cli.global.verbosity(Verbosity::Info), Verbosity::Debug);
            assert!(matches!(cli.command, Command::Run(RunArgs { until: Some(Lsn(16)) })));
        }
    }
}
