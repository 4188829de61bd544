//! The continuity report of a real archive: what it says of objects is what lies there, by tools everybody has.

use std::fs;
use std::process::Command;
use std::time::Duration;

use crate::support::agent;
use crate::support::archived::{Archived, create_journal, note};
use crate::support::postgres::{self, Server};
use crate::support::process;

const DEADLINE: Duration = Duration::from_secs(120);

#[test]
fn what_the_page_says_can_be_computed_from_the_files() {
    let Some(major) = postgres::newest_major() else { return };
    let server = Server::builder(major).wal_segment_mib(1).start();
    let archive = Archived::of(&server);
    let _agent = archive.streaming_agent();
    create_journal(&server);
    for number in 0..4 {
        note(&server, &format!("note {number}"));
        server.switch_wal();
    }
    archive.wait_acknowledged(&server);
    agent::seawall_ok(["backup", "--config", &archive.config_argument()]);

    let path = archive.repository().with_file_name("report.html");
    let file = path.to_str().expect("our paths are text");
    let said = agent::seawall_ok(["gaps", "--html", file, "--config", &archive.config_argument()]);
    assert_eq!(said, "no gaps\n");
    let page = fs::read_to_string(&path).expect("it was written");
    assert!(page.contains("0 open, 0 healed") && page.contains(&server.system_id()), "{page}");
    assert!(page.contains("class=\"run\"") && page.contains("class=\"backup\"") && page.contains("class=\"window\""));

    // The recipe, word for word.
    let recipe = page.split_once("<pre>").and_then(|(_, rest)| rest.split_once("</pre>")).expect("it tells how").0;
    let recipe = recipe.replace("&quot;", "\"").replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&");
    let archived = archive.archive();
    let directory = format!("wal/{:08X}{:08X}", 1, 0);
    let directory = archive.path_of(&archived.lineage.lineage_json()).with_file_name(directory);
    let recipe = recipe.replace("DIRECTORY", directory.to_str().expect("our paths are text"));
    let crc = process::run_ok(Command::new("bash").args(["-euo", "pipefail", "-c", &recipe]), DEADLINE);
    assert!(page.contains(&format!(">{}</td>", crc.trim())), "{crc} is not in {page}");
    let sealed = archive.catalog().directories().map(|digest| digest.indexed().count()).sum::<usize>();
    assert!(sealed >= 4 && page.contains(&format!("<dd>{sealed}, ")), "{sealed}");
}
