//! Retention on a real archive: what the plan says, that doing it leaves what a restore is planned from, and that it is done once.

use std::fs;

use serde_json::Value;

use crate::support::archived::{Archived, create_journal, note};
use crate::support::postgres::{self, Server};
use crate::support::process::{self, eventually};
use crate::support::rig::{PATIENCE, Rig};
use crate::support::{agent, http};

#[test]
fn what_no_rule_keeps_goes_once_and_the_rest_can_be_planned_for() {
    let Some(&major) = [18, 17, 16, 15, 14, 13].iter().find(|&&major| postgres::is_installed(major)) else { return };
    let server = Server::builder(major).wal_segment_mib(1).start();
    let archive = Archived::of(&server);
    let _agent = archive.streaming_agent();
    create_journal(&server);
    let answer = |arguments: &[&str]| {
        let config = archive.config_argument();
        let text = agent::seawall_ok([arguments, &["--json", "--config", &config]].concat());
        serde_json::from_str::<Value>(&text).expect("it answers in JSON")
    };
    let take = || answer(&["backup"])["id"].as_str().expect("it has an id").to_string();
    let mut ids = Vec::new();
    for round in 0..2 {
        ids.push(take());
        note(&server, &format!("after backup {round}"));
        server.switch_wal();
    }
    archive.wait_acknowledged(&server);

    let nothing = answer(&["expire", "--apply"]);
    let plan = &nothing["repositories"][0];
    assert!(plan["policy"].is_null() && plan["removed"]["objects"] == 0, "{plan}");

    archive.configure("retention.count = 1\n");
    let strange = archive.repository().join("another-tool.txt");
    std::fs::write(&strange, "not ours").expect("a file can be written");
    let planned = answer(&["expire"]);
    let plan = &planned["repositories"][0];
    let fates: Vec<&str> = plan["backups"].as_array().unwrap().iter().map(|it| it["fate"].as_str().unwrap()).collect();
    assert_eq!(fates, ["remove", "keep"], "{plan}");
    assert!(plan["freed"].is_null() && plan["removed"]["bytes"].as_u64().unwrap() > 0);
    assert_eq!(answer(&["list"])["backups"].as_array().unwrap().len(), 2, "a plan changes nothing");

    let done = answer(&["expire", "--apply"]);
    assert_eq!(done["repositories"][0]["freed"]["backups"], 1, "{done}");
    let left = answer(&["list", "--all"]);
    let left: Vec<&str> = left["backups"].as_array().unwrap().iter().map(|it| it["id"].as_str().unwrap()).collect();
    assert_eq!(left, [ids[1].as_str()]);
    assert!(strange.exists());
    archive.assert_no_gaps();
    let again = answer(&["expire", "--apply"]);
    assert_eq!(again["repositories"][0]["freed"]["backups"], 0, "{again}");

    let target = answer(&["restore", "--plan"]);
    assert_eq!(target["backup"]["id"].as_str().or(target["backup"].as_str()), Some(ids[1].as_str()), "{target}");
}

#[test]
fn the_agent_expires_by_itself_after_a_good_backup_and_says_so() {
    let Some(major) = postgres::newest_major() else { return };
    let server = Server::builder(major).wal_segment_mib(1).start();
    let mut rig = Rig::new(server);
    rig.settings = "tail_interval = \"200ms\"\nbackup.full = \"after 4MiB\"\nretention.count = 1\n[http]\nlisten = \"127.0.0.1:0\"\n".to_string();
    let mut agent = rig.start();
    let address = http::address(&mut agent);
    agent.wait_for_log("streaming", PATIENCE);
    let config = rig.scratch.join("seawall.toml");
    let config = config.to_str().expect("our paths are text");
    let answer = |arguments: &[&str]| {
        let text = agent::seawall_ok([arguments, &["--json", "--config", config]].concat());
        serde_json::from_str::<Value>(&text).expect("it answers in JSON")
    };
    let ids = || {
        let all = answer(&["list", "--all"]);
        let all = all["backups"].as_array().expect("a list").iter();
        all.map(|it| (it["id"].to_string(), it["status"] == "complete")).collect::<Vec<_>>()
    };
    let first = eventually(PATIENCE, "the first backup is there", || {
        rig.wait_archived();
        ids().into_iter().find(|(_, is_complete)| *is_complete)
    });
    for _ in 0..6 {
        rig.write();
        rig.server.switch_wal();
    }
    rig.wait_archived();
    eventually(PATIENCE, "another one took its place", || {
        let ids = ids();
        (ids.iter().any(|(_, is_complete)| *is_complete) && !ids.contains(&first)).then_some(())
    });
    let retention = eventually(PATIENCE, "status says what was freed", || {
        let retention = http::status_of(address, "main")["retention"].clone();
        (retention["freed_bytes"].as_u64() > Some(0)).then_some(retention)
    });
    assert!(retention["last_run"].is_string() && retention["failure"].is_null(), "{retention}");
    assert_eq!(retention["locked_objects"], 0, "{retention}");
    for verb in [&["verify", "--full"][..], &["gaps"]] {
        agent::seawall_ok([verb, &["--config", config]].concat());
    }
}

#[test]
fn what_is_not_ours_stays_and_a_wrong_path_is_refused() {
    let Some(major) = postgres::newest_major() else { return };
    let server = Server::builder(major).wal_segment_mib(1).start();
    let archive = Archived::of(&server);
    let _agent = archive.streaming_agent();
    archive.configure("retention.count = 1\nretention.automatic = false\n");
    create_journal(&server);
    let config = archive.config_argument();
    let answer = |arguments: &[&str]| {
        let text = agent::seawall_ok([arguments, &["--json", "--config", &config]].concat());
        serde_json::from_str::<Value>(&text).expect("it answers in JSON")
    };
    let take = || {
        let id = answer(&["backup", "--wait"])["id"].as_str().expect("it has an id").to_string();
        note(&server, &id);
        server.switch_wal();
        archive.wait_acknowledged(&server);
        id
    };
    let (old, new) = (take(), take());
    let root = archive.repository();
    let lineage = archive.path_of(&archive.archive().lineage.directory());
    let first = fs::read_dir(lineage.join("wal")).expect("there is WAL").find_map(|entry| {
        let path = entry.expect("it is listed").path();
        path.is_dir().then_some(path)
    });
    let wal = first.expect("there is a directory of WAL");
    let strangers = [
        root.join("another-tool.txt"),
        root.join("another-tool/wal/000000010000000000000001.zst"),
        lineage.join("another-tool.json"),
        lineage.join("another-tool/file"),
        wal.join("000000010000000000000001.zst.bak"),
        wal.join("000000010000000000000001.backup/notes"),
        lineage.join("backups").join(&old).join("notes.txt"),
        lineage.join("backups/notes/begin.json"),
    ];
    for path in &strangers {
        fs::create_dir_all(path.parent().expect("it lies in a directory")).expect("a directory can be made");
        fs::write(path, "another tool's").expect("a file can be written");
    }
    process::give_to_service_user(&root);

    let expire = |from: &str, to: &str| {
        let text = fs::read_to_string(archive.config()).expect("it was written");
        let typo = archive.config().with_file_name("typo.toml");
        assert!(text.contains(from));
        fs::write(&typo, text.replace(from, to)).expect("a test's file can be written");
        let refused = agent::seawall(["expire", "--apply", "--config", typo.to_str().expect("our paths are text")]);
        (refused.status.code(), String::from_utf8_lossy(&refused.stderr).into_owned())
    };
    let url = format!("file://{}", root.display());
    let (code, said) = expire(&url, &format!("{url}y"));
    assert!(code != Some(0) && said.contains("repositoryy"), "{code:?}: {said}");
    // Another tool's directory is no repository.
    let (code, said) = expire(&url, &format!("{url}/another-tool"));
    assert!(code != Some(0) && said.contains("holds no repository of seawall's"), "{code:?}: {said}");
    let (code, said) = expire("[clusters.main]", "[clusters.mein]");
    assert!(code == Some(78) && said.contains("holds nothing for cluster mein"), "{code:?}: {said}");
    assert_eq!(answer(&["list"])["backups"].as_array().map(Vec::len), Some(2));

    let done = answer(&["expire", "--apply"]);
    assert_eq!(done["repositories"][0]["freed"]["backups"], 1, "{done}");
    for path in &strangers {
        assert_eq!(fs::read_to_string(path).ok().as_deref(), Some("another tool's"), "{}", path.display());
    }
    let left: Vec<_> = fs::read_dir(lineage.join("backups").join(&old)).expect("it stays for the notes").collect();
    assert_eq!(left.len(), 1, "{left:?}");
    let again = answer(&["expire", "--apply"]);
    let freed = &again["repositories"][0]["freed"];
    assert_eq!((&freed["backups"], &freed["segments"]), (&0.into(), &0.into()), "{again}");
    let list = answer(&["list"]);
    assert_eq!(list["backups"][0]["id"], new.as_str(), "{list}");
    archive.assert_no_gaps();
}
