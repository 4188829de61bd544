//! The archive as a synchronous standby: commits wait for the repository, one tail after the other, and what a
//! client was told is committed is there when agent and server die in the same moment.

use crate::support::agent;
use crate::support::postgres::{self, Server};
use crate::support::process;
use crate::support::rig::{NO_BACKUPS, PATIENCE, Rig};
use seawall::wal::Lsn;

/// No tail is ever due by itself: whatever is stored was stored because a commit waited for it.
const NO_TAIL_BY_TIME: &str = "tail_interval = \"1h\"\nsynchronous = true\n";

fn synchronous_rig(major: u32) -> Rig {
    let server = Server::builder(major).wal_segment_mib(1).setting("autovacuum", "off");
    let mut rig = Rig::new(server.start());
    rig.settings = format!("{NO_BACKUPS}{NO_TAIL_BY_TIME}");
    rig
}

/// Makes commits wait, to the point where the server applies what we report: `remote_apply` is the strictest.
fn require_archive(rig: &mut Rig) {
    rig.server.set("synchronous_standby_names", "seawall");
    rig.server.set("synchronous_commit", "remote_apply");
    rig.server.reload();
    process::eventually(PATIENCE, "it is synchronous", || {
        (rig.server.value("select sync_state from pg_stat_replication") == "sync").then_some(())
    });
}

#[test]
fn what_was_committed_is_in_the_repository_when_agent_and_server_die_at_once() {
    for major in postgres::available_majors() {
        let mut rig = synchronous_rig(major);
        let mut agent = rig.start();
        process::eventually(PATIENCE, "the slot reserves WAL", || rig.slot()?.restart_lsn);
        rig.server.sql("create table commits (i int)");
        require_archive(&mut rig);
        let mut before_last_commit = Lsn::ZERO;
        for i in 0..30 {
            let script = format!("begin; insert into commits values ({i}); select pg_current_wal_insert_lsn(); commit");
            before_last_commit = rig.server.value(&script).parse().expect("an LSN");
        }
        agent.kill9();
        rig.server.kill9();
        let durable = rig.durable();
        assert!(
            durable > before_last_commit,
            "{major}: {durable} is durable, the last commit is at {before_last_commit}"
        );
    }
}

#[test]
fn many_committers_share_a_tail() {
    let Some(major) = postgres::newest_major() else { return };
    let mut rig = synchronous_rig(major);
    let mut agent = rig.start();
    process::eventually(PATIENCE, "the slot reserves WAL", || rig.slot()?.restart_lsn);
    rig.server.sql("create table commits (i int)");
    require_archive(&mut rig);
    const CLIENTS: usize = 8;
    const COMMITS: usize = 12;
    std::thread::scope(|scope| {
        for client in 0..CLIENTS {
            let server = &rig.server;
            scope.spawn(move || {
                for i in 0..COMMITS {
                    server.sql(&format!("insert into commits values ({})", client * COMMITS + i));
                }
            });
        }
    });
    let rows = rig.server.value("select count(*) from commits");
    assert_eq!(rows, (CLIENTS * COMMITS).to_string());
    agent.terminate(PATIENCE);
    agent::seawall_ok(["gaps", "--config", rig.config("seawall").to_str().expect("UTF-8")]);
}

#[test]
fn the_server_decides_where_the_configuration_does_not() {
    let Some(major) = postgres::newest_major() else { return };
    let mut rig = synchronous_rig(major);
    rig.settings = format!("{NO_BACKUPS}tail_interval = \"1h\"\n");
    let mut agent = rig.start();
    process::eventually(PATIENCE, "the slot reserves WAL", || rig.slot()?.restart_lsn);
    rig.server.sql("create table commits (i int)");
    // Said to be synchronous from the start; the first tail makes it a candidate.
    rig.server.set("synchronous_standby_names", "*");
    rig.server.set("synchronous_commit", "local");
    rig.server.reload();
    rig.server.sql("insert into commits values (1)");
    rig.server.switch_wal();
    agent.wait_for_log("it is a synchronous standby", PATIENCE);
    rig.server.set("synchronous_commit", "on");
    rig.server.reload();
    rig.server.sql("insert into commits values (2)");
    agent.terminate(PATIENCE);
}
