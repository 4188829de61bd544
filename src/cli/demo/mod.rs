//! `demo`: a scratch server, an agent that dies in mid-stream, a table dropped by accident and brought back, a server
//! that is destroyed and recovered to the last commit.
//!
//! Owns: the story and how it is told. Does not own: directories and processes (`scene.rs`), which PostgreSQL plays
//! the server (`installation.rs`), anything the agent or `wal-get` does: it runs them as everybody does.

mod installation;
mod scene;

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::args::DemoArgs;
use super::{Verdict, output, setup};
use crate::catalog::store::{self, Archive};
use crate::continuity;
use crate::error::{ExitCode, Failure};
use crate::repository::{Backend, LocalBackend};
use crate::wal::Lsn;
use installation::{Installation, ServiceUser};
use scene::{Interrupt, Keep, Scene, Server};

const SLOT: &str = "seawall";
/// How long the load runs, when the agent is killed, and when it comes back.
const LOAD_SECONDS: u64 = 8;
const KILLED_AFTER: Duration = Duration::from_secs(3);
const AWAY_FOR: Duration = Duration::from_secs(3);
/// For what takes a second or two on an idle machine.
const PATIENCE: Duration = Duration::from_secs(300);
/// What a shell says of a process that Ctrl-C has ended.
const INTERRUPTED: i32 = 130;

pub fn run(args: &DemoArgs) -> Result<Verdict, Failure> {
    let interrupt = Interrupt::listen();
    let user = ServiceUser::find()?;
    let installation = Installation::find(user)?;
    let mut scene = Scene::new(installation, user, interrupt.clone())?;
    let told = Story::new(&mut scene).tell();
    match told {
        Ok(copy) if args.keep => {
            output::text(&what_is_kept(&scene, &copy));
            scene.leave();
            Ok(Verdict::Fine)
        }
        Ok(_) => {
            scene.clear(Keep::Nothing);
            output::text("\nEverything is stopped and removed. With --keep it stays, to be looked at.");
            Ok(Verdict::Fine)
        }
        Err(_) if interrupt.is_set() => {
            scene.clear(Keep::Nothing);
            output::note("interrupted: everything is stopped and removed");
            std::process::exit(INTERRUPTED)
        }
        Err(failure) => {
            let directory = scene.directory.clone();
            let hint = match args.keep {
                true => format!("everything is kept in {}", directory.display()),
                false => format!("the logs are kept in {}/logs; all else is stopped and removed", directory.display()),
            };
            match args.keep {
                true => scene.leave(),
                false => scene.clear(Keep::Logs),
            }
            Err(failure.hint(hint))
        }
    }
}

fn what_is_kept(scene: &Scene, copy: &Server) -> String {
    let library = scene.installation.library().map(|library| format!("LD_LIBRARY_PATH={} ", library.display()));
    let (directory, library) = (scene.directory.display(), library.unwrap_or_default());
    let psql = scene.installation.bin.join("psql");
    format!(
        "\nKept, as you wished:\n  \
         the copy runs    {library}{psql} -h {socket} -U {user} postgres\n  \
         the repository   {directory}/repository\n  \
         the logs         {directory}/logs\n  \
         to stop it       kill -INT $(head -1 {data}/postmaster.pid)\n  \
         to remove it     rm -rf {directory}",
        psql = psql.display(),
        socket = copy.socket.display(),
        user = Server::USER,
        data = copy.data.display(),
    )
}

/// The rows of both sides, as one line each.
const CENSUS: &str = "SELECT (SELECT count(*) FROM pgbench_accounts), (SELECT count(*) FROM pgbench_history), \
                      (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(delta) FROM pgbench_history)";
/// What there is to count after the accident.
const REMAINS: &str = "SELECT (SELECT count(*) FROM pgbench_history), (SELECT word FROM last_word)";
/// Of what `restore` says, so many lines are shown.
const RESTORE_LINES: usize = 12;

/// How much WAL the slot holds on the server.
const HELD: &str = "SELECT pg_wal_lsn_diff(pg_current_wal_flush_lsn(), restart_lsn)::bigint \
                    FROM pg_replication_slots WHERE slot_name = 'seawall'";

struct Story<'a> {
    scene: &'a mut Scene,
    server: Server,
    began: Instant,
    step: u32,
}

impl<'a> Story<'a> {
    fn new(scene: &'a mut Scene) -> Story<'a> {
        let server = scene.server("server", "server");
        Story { scene, server, began: Instant::now(), step: 0 }
    }

    /// The whole of it; the last copy still runs.
    fn tell(mut self) -> Result<Server, Failure> {
        let (version, bin) = (&self.scene.installation.version, self.scene.installation.bin.display());
        output::text(&format!("Seawall {} meets PostgreSQL {version} ({bin})", env!("CARGO_PKG_VERSION")));
        output::text(&format!("in {}", self.scene.directory.display()));
        self.a_server()?;
        self.an_agent()?;
        self.load_and_a_crash()?;
        let before = self.an_accident()?;
        let target = self.the_moment()?;
        self.back_before_it(&target, &before)?;
        let census = self.the_last_word()?;
        self.everything_is_gone(&census)
    }

    fn a_server(&mut self) -> Result<(), Failure> {
        self.step("A server without archive_command, and some data");
        let mut initdb = self.scene.tool("initdb");
        initdb.args(["-U", Server::USER, "-A", "trust", "-E", "UTF8", "--locale=C", "-k", "-N", "-D"]);
        initdb.arg(&self.server.data);
        self.scene.run("initdb", initdb)?;
        let settings = format!(
            "listen_addresses = ''\nunix_socket_directories = '{}'\nlogging_collector = off\nautovacuum = on\n",
            self.server.socket.display()
        );
        self.scene.append(&self.server.data.join("postgresql.conf"), &settings)?;
        let server = self.server.clone();
        self.scene.start_server(&server)?;
        let archive_mode = self.sql("SHOW archive_mode")?;
        let started = Instant::now();
        self.pgbench(&["-i", "-q", "-s", "5"])?;
        self.sql("CREATE TABLE last_word (word text)")?;
        let rows = self.sql("SELECT count(*) FROM pgbench_accounts")?;
        self.say(&format!(
            "archive_mode = {archive_mode}; pgbench -i: {} accounts in {}",
            grouped(&rows),
            seconds(started)
        ));
        Ok(())
    }

    fn an_agent(&mut self) -> Result<(), Failure> {
        self.step("`seawall run`: streams the WAL into a directory, and takes the first backup without being asked");
        let configuration = format!(
            "[clusters.main]\npostgres = \"{}\"\ntail_interval = \"1s\"\n\n[repositories.local]\nurl = \"file://{}\"\n",
            self.server.conninfo(),
            self.scene.path("repository").display()
        );
        self.scene.append(&self.scene.configuration(), &configuration)?;
        let started = Instant::now();
        let pid = self.scene.start_agent()?;
        self.wait_for_stream()?;
        self.say(&format!("process {pid}, slot \"{SLOT}\"; no byte waits longer than a second for its upload"));
        self.scene.wait("the first backup", PATIENCE, |scene| {
            scene.check_agent()?;
            let (code, answer) = scene.answer("seawall list", scene.seawall(&["list", "--json"]))?;
            Ok((code == 0 && answer.contains("\"complete\"")).then_some(()))
        })?;
        self.say(&format!("the first backup was complete {} after the start", seconds(started)));
        let list = self.scene.seawall(&["list"]);
        self.quote("seawall list", list).map(drop)
    }

    fn load_and_a_crash(&mut self) -> Result<(), Failure> {
        self.step(&format!("{LOAD_SECONDS} seconds of pgbench, and a crash of the agent in the middle"));
        let started = Instant::now();
        let mut load = self.scene.tool("pgbench");
        load.args(["-n", "-c", "4", "-j", "2", "-T", &LOAD_SECONDS.to_string(), &self.server.conninfo()]);
        self.scene.start_load(load)?;
        self.scene.pause(KILLED_AFTER)?;
        self.load_line(started, "streaming: not stored yet")?;
        self.scene.kill_agent();
        self.say("kill -9: the agent is gone, the server does not notice");
        self.scene.pause(AWAY_FOR)?;
        let missed = self.load_line(started, "no agent: the slot holds")?;
        let back = Instant::now();
        let pid = self.scene.start_agent()?;
        self.wait_for_slot("the agent catches up", missed)?;
        self.say(&format!("`seawall run` again, process {pid}: caught up {} after its start", seconds(back)));
        let over = |scene: &mut Scene| {
            scene.check_agent()?;
            Ok(scene.is_load_over()?.then_some(()))
        };
        self.scene.wait("pgbench ends", PATIENCE, over)
    }

    /// What the table held before it went.
    fn an_accident(&mut self) -> Result<String, Failure> {
        self.step("The accident: somebody drops a table, and work goes on");
        let census = self.sql(CENSUS)?;
        self.say(&format!("the server holds {}", shown(&census)));
        self.sql("DROP TABLE pgbench_accounts")?;
        self.say("DROP TABLE pgbench_accounts");
        self.sql("INSERT INTO last_word SELECT 'business as usual' FROM generate_series(1, 1000)")?;
        self.sql("DELETE FROM last_word")?;
        let lsn = self.flush_lsn()?;
        self.wait_for_slot("the accident is archived", lsn)?;
        Ok(census)
    }

    /// The target that stops just before the accident.
    fn the_moment(&mut self) -> Result<Vec<String>, Failure> {
        self.step("When was it? And what can be restored?");
        let find = self.scene.seawall(&["find"]);
        self.quote("seawall find", find)?;
        let window = self.scene.seawall(&["window"]);
        self.quote("seawall window", window)?;
        let answer = self.scene.run("seawall find --json", self.scene.seawall(&["find", "--json"]))?;
        // It dropped the largest relation: a table, its index, its visibility map go in one commit, the last one.
        let answer: serde_json::Value = serde_json::from_str(&answer)
            .map_err(|error| Failure::new(ExitCode::Internal, format!("seawall find --json: {error}")))?;
        let mut drops = answer["events"].as_array().into_iter().flatten().filter(|event| event["kind"] == "drop");
        let restore = drops.next_back().and_then(|event| event["restore"].as_str());
        let restore =
            restore.ok_or_else(|| Failure::new(ExitCode::Internal, "`seawall find` does not know the accident"))?;
        Ok(restore.split(' ').map(str::to_string).collect())
    }

    fn back_before_it(&mut self, target: &[String], census: &str) -> Result<(), Failure> {
        self.step("Restored to just before it, beside the running server");
        let copy = self.restored("before", target)?;
        self.compare(&copy, census)?;
        self.scene.crash_server(&copy)?;
        self.scene.remove(&copy.data)
    }

    /// The last commit, and the wait until it is durable. What the server holds then.
    fn the_last_word(&mut self) -> Result<String, Failure> {
        self.step("The last commit, and when it is safe");
        self.sql("INSERT INTO last_word VALUES ('remember me')")?;
        let committed = Instant::now();
        let lsn = self.flush_lsn()?;
        self.wait_for_slot("the last commit becomes durable", lsn)?;
        self.say(&format!(
            "committed before {lsn}; durable, and acknowledged to the server, {} later",
            seconds(committed)
        ));
        let status = self.scene.seawall(&["status"]);
        self.quote("seawall status", status)?;
        let repository = self.scene.path("repository");
        let held = setup::block_on(contents(repository.clone()))??;
        let stored = bytes_below(&repository);
        self.say(&format!(
            "{} of WAL without a hole, and the backup, in {} on disk",
            output::size(held.bytes),
            output::size(stored),
        ));
        self.sql(REMAINS)
    }

    fn everything_is_gone(mut self, remains: &str) -> Result<Server, Failure> {
        self.step("The worst: the server stops dead, and its data directory is gone");
        let server = self.server.clone();
        self.scene.crash_server(&server)?;
        self.scene.remove(&server.data)?;
        self.scene.stop_agent()?;
        let copy = self.restored("copy", &[])?;
        let recovered = self.scene.sql(&copy, REMAINS)?;
        if recovered != remains {
            let message = format!("the copy differs: {recovered} instead of {remains}");
            return Err(Failure::new(ExitCode::Internal, message));
        }
        let (history, word) = recovered.split_once('|').unwrap_or((&recovered, "?"));
        self.say(&format!("the copy holds {} transactions, \"{word}\"", grouped(history)));
        output::text(&format!("\nThe same, to the last commit, after {} in all.", seconds(self.began)));
        Ok(copy)
    }

    /// `seawall restore` into a new directory, and the server started on it, until it has been promoted.
    fn restored(&mut self, name: &str, target: &[String]) -> Result<Server, Failure> {
        let copy = self.scene.server(name, name);
        let pgdata = copy.data.display().to_string();
        let mut arguments: Vec<&str> = vec!["restore", "--pgdata", &pgdata];
        arguments.extend(target.iter().map(String::as_str));
        let started = Instant::now();
        let shown = format!("seawall restore --pgdata …/{name} {}", target.join(" "));
        let (code, answer) = self.scene.answer("seawall restore", self.scene.seawall(&arguments))?;
        self.say(&format!("$ {}", shown.trim_end()));
        if code != 0 {
            return Err(Failure::new(ExitCode::Internal, format!("`seawall restore` ended with {code}: {answer}")));
        }
        answer.lines().take(RESTORE_LINES).for_each(|line| self.say(line));
        let files = seconds(started);
        let settings = format!("unix_socket_directories = '{}'\n", copy.socket.display());
        self.scene.append(&copy.data.join("postgresql.auto.conf"), &settings)?;
        let started = Instant::now();
        self.scene.start_server(&copy)?;
        self.scene.wait("the recovery ends", PATIENCE, |scene| {
            Ok((scene.sql(&copy, "SELECT pg_is_in_recovery()")? == "f").then_some(()))
        })?;
        let timeline = self.scene.sql(&copy, "SELECT substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8)")?;
        self.say(&format!(
            "files in {files}; started, recovered and promoted in {}, on timeline {timeline}",
            seconds(started)
        ));
        Ok(copy)
    }

    fn compare(&self, copy: &Server, census: &str) -> Result<(), Failure> {
        let recovered = self.scene.sql(copy, CENSUS)?;
        self.say(&format!("the copy holds   {}", shown(&recovered)));
        if recovered == census {
            return Ok(());
        }
        let message = format!("the copy differs: {recovered} instead of {census}");
        Err(Failure::new(ExitCode::Internal, message))
    }

    // --- Words ---

    fn step(&mut self, title: &str) {
        self.step += 1;
        output::text(&format!("\n{}. {title}", self.step));
    }

    fn say(&self, words: &str) {
        output::text(&format!("   {words}"));
    }

    /// Runs a command of ours and shows what it says.
    fn quote(&self, shown: &str, command: std::process::Command) -> Result<i32, Failure> {
        let (code, answer) = self.scene.answer(shown, command)?;
        self.say(&format!("$ {shown}"));
        answer.lines().for_each(|line| self.say(line));
        Ok(code)
    }

    /// One line on load and slot; the server's position.
    fn load_line(&mut self, started: Instant, words: &str) -> Result<Lsn, Failure> {
        let transactions = self.sql("SELECT count(*) FROM pgbench_history")?;
        let held = self.sql(HELD)?.parse().unwrap_or(0);
        self.say(&format!(
            "{:>3}   {} transactions; {words} {}",
            format!("{:.0} s", started.elapsed().as_secs_f64()),
            grouped(&transactions),
            output::size(held)
        ));
        self.flush_lsn()
    }

    // --- The server ---

    fn sql(&self, query: &str) -> Result<String, Failure> {
        self.scene.sql(&self.server, query)
    }

    fn pgbench(&self, arguments: &[&str]) -> Result<String, Failure> {
        let mut pgbench = self.scene.tool("pgbench");
        pgbench.args(arguments).arg(self.server.conninfo());
        self.scene.run("pgbench", pgbench)
    }

    fn flush_lsn(&self) -> Result<Lsn, Failure> {
        let text = self.sql("SELECT pg_current_wal_flush_lsn()")?;
        text.parse().map_err(|_| Failure::new(ExitCode::Internal, format!("not a position: {text}")))
    }

    fn wait_for_stream(&mut self) -> Result<(), Failure> {
        let server = self.server.clone();
        self.scene.wait("the agent streams", PATIENCE, |scene| {
            scene.check_agent()?;
            let query = "SELECT 1 FROM pg_stat_replication JOIN pg_replication_slots ON active_pid = pid \
                         WHERE state = 'streaming'";
            Ok((scene.sql(&server, query)? == "1").then_some(()))
        })
    }

    /// Until the server was told that everything up to `lsn` is durable.
    fn wait_for_slot(&mut self, what: &str, lsn: Lsn) -> Result<(), Failure> {
        let server = self.server.clone();
        let query = format!("SELECT restart_lsn >= '{lsn}' FROM pg_replication_slots WHERE slot_name = '{SLOT}'");
        self.scene.wait(what, PATIENCE, |scene| {
            scene.check_agent()?;
            Ok((scene.sql(&server, &query)? == "t").then_some(()))
        })
    }
}

/// What is in the repository, as a reader finds it.
struct Contents {
    bytes: u64,
}

async fn contents(repository: std::path::PathBuf) -> Result<Contents, Failure> {
    let backend: Arc<dyn Backend> = Arc::new(LocalBackend::open(repository));
    let mut held = Contents { bytes: 0 };
    for (lineage, _) in store::lineages(backend.as_ref(), "main").await? {
        let catalog = Archive::new(backend.clone(), lineage).load_catalog().await?;
        for timeline in catalog.timelines.keys() {
            let runs = continuity::runs(*timeline, catalog.pieces(*timeline));
            held.bytes += runs.iter().map(|run| run.to - run.from).sum::<u64>();
        }
    }
    Ok(held)
}

fn bytes_below(path: &std::path::Path) -> u64 {
    let Ok(found) = path.symlink_metadata() else { return 0 };
    if !found.is_dir() {
        return found.len();
    }
    let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
    entries.map(|entry| bytes_below(&entry.path())).sum()
}

fn seconds(since: Instant) -> String {
    format!("{:.1} s", since.elapsed().as_secs_f64())
}

/// `1234567` as `1,234,567`.
fn grouped(digits: &str) -> String {
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) && text != "-" {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// The columns of [`CENSUS`] for people.
fn shown(census: &str) -> String {
    let columns: Vec<&str> = census.split('|').collect();
    let [accounts, history, balances, deltas] = columns[..] else { return census.to_string() };
    format!(
        "{} accounts, {} transactions, balances {}, deltas {}",
        grouped(accounts),
        grouped(history),
        grouped(balances),
        grouped(deltas)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_grouped() {
        let groups = ["0", "12", "123", "1234", "1234567", "-123456", "-12"].map(grouped);
        assert_eq!(groups, ["0", "12", "123", "1,234", "1,234,567", "-123,456", "-12"]);
        assert_eq!(shown("1000|20|5|5"), "1,000 accounts, 20 transactions, balances 5, deltas 5");
    }
}
