//! Several repositories of one cluster: what is acknowledged while one is away, what it gets back, and what stops all
//! of them. On virtual time; seeded histories are `simulation.rs`'s.

use std::collections::BTreeSet;

use seawall::agent::cluster::State;
use seawall::agent::session::RepositoryState;
use seawall::catalog::ledger::FactKind;
use seawall::catalog::store;
use seawall::error::{Disposition, ExitCode};
use seawall::repository::layout::Epoch;
use seawall::testkit::store::FaultyStore;
use seawall::wal::Lsn;

use crate::support::model::{Model, Running, archives, eventually, facts, on_virtual_time};

fn stores(count: u64) -> Vec<FaultyStore> {
    (1..=count).map(FaultyStore::new).collect()
}

fn segments(store: &FaultyStore) -> BTreeSet<String> {
    let objects = store.memory().objects();
    let is_segment = |name: &String| name.ends_with(".zst") && !name.contains(".tail/");
    objects.keys().map(ToString::to_string).filter(is_segment).collect()
}

/// The states of the repositories, in one word each.
fn states(agent: &Running) -> Vec<&'static str> {
    let Some(watched) = agent.status.borrow().watched.clone() else { return Vec::new() };
    let word = |state| match state {
        RepositoryState::Writing => "writing",
        RepositoryState::Behind => "behind",
        RepositoryState::Repairing { .. } => "repairing",
        RepositoryState::Absent(_) => "absent",
    };
    watched.repositories.iter().map(|repository| word(repository.state())).collect()
}

async fn wait_states(agent: &Running, expected: &[&str]) {
    eventually(&format!("the repositories are {expected:?}"), || states(agent) == expected).await;
}

/// An agent whose repositories hold something, all of them.
async fn working(model: &mut Model, stores: &[FaultyStore], required: usize) -> Running {
    let agent = model.agent_of("seawall", stores, required);
    agent.wait_state(State::Streaming).await;
    model.write(3_000_000, 1);
    model.wait_acknowledged("seawall").await;
    wait_states(&agent, &vec!["writing"; stores.len()]).await;
    agent
}

#[test]
fn what_any_of_them_holds_is_acknowledged_where_one_is_required() {
    on_virtual_time(async {
        let (mut model, stores) = (Model::new(), stores(2));
        let _agent = working(&mut model, &stores, 1).await;
        stores[1].set_outage(true);
        model.write(3_000_000, 2);
        model.wait_acknowledged("seawall").await;
        assert!(segments(&stores[1]).len() < segments(&stores[0]).len());
        stores[1].set_outage(false);
        eventually("the other has caught up", || segments(&stores[1]) == segments(&stores[0])).await;
    });
}

#[test]
fn nothing_is_acknowledged_that_one_lacks_where_all_are_required() {
    on_virtual_time(async {
        let (mut model, stores) = (Model::new(), stores(2));
        let _agent = working(&mut model, &stores, 2).await;
        let before = model.restart_lsn("seawall");
        stores[0].set_outage(true);
        model.write(3_000_000, 2);
        eventually("one of them goes on", || segments(&stores[1]).len() > segments(&stores[0]).len()).await;
        tokio::time::sleep(std::time::Duration::from_secs(600)).await;
        let held = store_end(&stores[0]).await;
        assert!(model.restart_lsn("seawall") <= before.max(Some(held)), "{:?}", model.restart_lsn("seawall"));
        stores[0].set_outage(false);
        model.wait_acknowledged("seawall").await;
        eventually("both hold the same", || segments(&stores[1]) == segments(&stores[0])).await;
    });
}

async fn store_end(store: &FaultyStore) -> Lsn {
    let archive = archives(store.memory()).await.remove(0);
    let catalog = archive.load_catalog().await.expect("the catalog is readable");
    let timelines = catalog.timelines.keys();
    timelines.flat_map(|&timeline| catalog.pieces(timeline)).map(|piece| piece.to).max().unwrap_or_default()
}

#[test]
fn one_that_is_lost_and_made_anew_gets_back_all_of_it() {
    on_virtual_time(async {
        let (mut model, stores) = (Model::new(), stores(2));
        let agent = working(&mut model, &stores, 2).await;
        agent.kill().await;
        stores[1].memory().tamper(|objects| objects.clear());
        let agent = model.agent_of("seawall", &stores, 2);
        wait_states(&agent, &["writing", "absent"]).await;
        assert_eq!(stores[1].memory().objects().len(), 0, "nothing is made in the place of what may come back");
        let acknowledged = model.restart_lsn("seawall");
        model.write(3_000_000, 2);
        let before = segments(&stores[0]).len();
        model.write(3_000_000, 3);
        eventually("the other goes on", || segments(&stores[0]).len() > before).await;
        assert_eq!(model.restart_lsn("seawall"), acknowledged);

        let now = "2026-01-01T00:00:00Z".parse().expect("a time");
        store::create_repository(stores[1].memory(), now, "feedface").await.expect("the model store takes it");
        wait_states(&agent, &["writing", "writing"]).await;
        model.wait_acknowledged("seawall").await;
        eventually("both hold the same", || segments(&stores[1]) == segments(&stores[0])).await;
        let start = archives(stores[1].memory()).await[0].lineage_file().await.expect("it joined").start_lsn;
        assert_eq!(start, archives(stores[0].memory()).await[0].lineage_file().await.expect("it is there").start_lsn);
        assert_eq!(facts(stores[1].memory(), FactKind::Gap).await, []);
    });
}

#[test]
fn one_that_was_away_over_a_restart_is_repaired_in_order() {
    on_virtual_time(async {
        let (mut model, stores) = (Model::new(), stores(3));
        let agent = working(&mut model, &stores, 1).await;
        agent.kill().await;
        stores[2].set_outage(true);
        let agent = model.agent_of("seawall", &stores, 1);
        wait_states(&agent, &["writing", "writing", "absent"]).await;
        model.write(5_000_000, 2);
        model.wait_acknowledged("seawall").await;
        stores[2].set_outage(false);
        wait_states(&agent, &["writing", "writing", "writing"]).await;
        eventually("all hold the same", || segments(&stores[2]) == segments(&stores[0])).await;
        // Copied, not received again: the server had forgotten it.
        assert_eq!(facts(stores[2].memory(), FactKind::Gap).await, []);
        let bodies = |store: &FaultyStore| {
            let mut objects = store.memory().objects();
            objects.retain(|key, _| key.as_str().ends_with(".zst") && !key.as_str().contains(".tail/"));
            objects
        };
        assert_eq!(bodies(&stores[2]), bodies(&stores[0]));
    });
}

#[test]
fn fenced_in_one_is_fenced_in_all() {
    on_virtual_time(async {
        let (mut model, stores) = (Model::new(), stores(2));
        let agent = working(&mut model, &stores, 1).await;
        let archive = archives(stores[1].memory()).await.remove(0);
        let highest = archive.highest_epoch().await.expect("readable").expect("one was taken");
        let now = "2026-01-01T00:00:00Z".parse().expect("a time");
        let next = Epoch(highest.0 + 1);
        assert!(archive.claim_epoch(next, "another", None, "0", now).await.expect("the model store takes it"));
        tokio::time::sleep(std::time::Duration::from_secs(60)).await;
        model.write(3_000_000, 2);
        agent.wait_state(State::Waiting).await;
    });
}

#[test]
fn a_conflict_in_one_stops_the_cluster() {
    on_virtual_time(async {
        let (mut model, stores) = (Model::new(), stores(2));
        let agent = working(&mut model, &stores, 1).await;
        agent.kill().await;
        // Another history under the same names, in one of them.
        stores[1].memory().tamper(|objects| {
            let tails: Vec<_> = objects.keys().filter(|key| key.as_str().contains(".tail/")).cloned().collect();
            for tail in tails {
                let body = objects.remove(&tail).expect("just listed");
                let name = tail.as_str().to_string();
                let (head, commit) = name.rsplit_once('-').expect("a tail's name");
                let (head, _crc) = head.rsplit_once('-').expect("a tail's name");
                objects.insert(seawall::repository::Key::new(format!("{head}-00000001-{commit}")), body);
            }
        });
        model.write(100_000, 2);
        let failure = model.agent_of("seawall", &stores, 1).wait_end().await;
        assert_eq!((failure.exit_code, failure.disposition), (ExitCode::Data, Disposition::Stop), "{failure}");
    });
}
