//! Retention on a real archive: what the plan says, that doing it leaves what a restore is planned from, and that it is done once.

use serde_json::Value;

use crate::support::agent;
use crate::support::archived::{Archived, create_journal, note};
use crate::support::postgres::{self, Server};

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
