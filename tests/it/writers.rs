//! Two agents with two slots and one repository, on virtual time: one writes, the other waits, takes over, and a
//! writer that comes back from the dead writes nothing more.

use std::time::Duration;

use seawall::agent::cluster::State;
use seawall::catalog::store;
use seawall::testkit::store::{Event, FaultyStore, MemoryStore};
use seawall::wal::TimelineId;

use crate::support::model::{Model, Running, archives, eventually, on_virtual_time};

fn stored(store: &FaultyStore) -> usize {
    store.journal().iter().filter(|event| matches!(event, Event::Stored { .. })).count()
}

/// A model, and an agent on each slot, each with its own way to the same store.
async fn two_agents() -> (Model, [FaultyStore; 2], Running, Running) {
    let memory = MemoryStore::default();
    let stores = [FaultyStore::around(memory.clone(), 1), FaultyStore::around(memory, 2)];
    let mut model = Model::new();
    let first = model.agent("first", &stores[0]);
    first.wait_state(State::Streaming).await;
    model.write(300_000, 1);
    model.wait_acknowledged("first").await;
    let second = model.agent("second", &stores[1]);
    second.wait_state(State::Waiting).await;
    (model, stores, first, second)
}

#[test]
fn a_second_agent_waits_without_holding_wal_and_takes_over() {
    on_virtual_time(async {
        let (mut model, stores, first, second) = two_agents().await;
        for value in 0..5 {
            model.write(700_000, value);
            model.wait_acknowledged("first").await;
            model.wait_acknowledged("second").await;
        }
        assert_eq!(stored(&stores[1]), 0, "it writes nothing while it waits");
        tokio::time::sleep(Duration::from_secs(600)).await;
        assert_eq!(stored(&stores[1]), 0, "an idle server is no dead writer");

        first.kill().await;
        model.write(700_000, 9);
        second.wait_state(State::Streaming).await;
        model.wait_acknowledged("second").await;

        let returned = model.agent("first", &stores[0]);
        returned.wait_state(State::Waiting).await;
        model.write(700_000, 10);
        model.wait_acknowledged("second").await;
        model.wait_acknowledged("first").await;
    });
}

#[test]
fn a_fenced_writer_writes_nothing_more() {
    on_virtual_time(async {
        let (mut model, stores, first, second) = two_agents().await;
        // Cut off from its store, not from the server: as dead as a stopped process, and not aware of it.
        stores[0].set_outage(true);
        model.write(1_500_000, 2);
        second.wait_state(State::Streaming).await;
        model.wait_acknowledged("second").await;
        let before = stored(&stores[0]);
        let acknowledged = model.restart_lsn("first");

        stores[0].set_outage(false);
        model.write(700_000, 3);
        first.wait_state(State::Waiting).await;
        model.wait_acknowledged("second").await;
        assert_eq!(stored(&stores[0]), before, "the fenced writer stores nothing");
        assert!(model.restart_lsn("first") >= acknowledged);
        eventually("the fenced one follows", || model.restart_lsn("first") == Some(model.wal.flush_lsn())).await;
    });
}

/// The only repository that knew of the later epochs is emptied, made anew, and written to once more by a writer that
/// has not noticed: what is stored next has to count beside that.
#[test]
fn an_epoch_is_above_everything_that_an_emptied_repository_holds() {
    on_virtual_time(async {
        let mut model = Model::new();
        let stores = [1, 2].map(FaultyStore::new);
        let agent = model.agent_of("seawall", &stores, 1);
        model.write(50_000, 1);
        model.wait_acknowledged("seawall").await;
        agent.kill().await;
        stores[0].set_outage(true);
        for value in 2..4 {
            let agent = model.agent_of("seawall", &stores, 1);
            model.write(50_000, value);
            model.wait_acknowledged("seawall").await;
            agent.kill().await;
        }
        let agent = model.agent_of("seawall", &stores, 1);
        model.write(50_000, 4);
        model.wait_acknowledged("seawall").await;

        stores[1].memory().tamper(|objects| objects.clear());
        let now = "2026-01-01T00:00:00Z".parse().expect("a time");
        store::create_repository(stores[1].memory(), now, "feedface").await.expect("the model store takes it");
        model.write(50_000, 5);
        model.wait_acknowledged("seawall").await;
        stores[0].set_outage(false);
        model.server.with(|state| state.crash());
        let flush = model.write(50_000, 6);
        let ends = async || {
            let mut ends = Vec::new();
            for store in &stores {
                let archive = archives(store.memory()).await.pop();
                let archive = archive.expect("the lineage is there");
                let found = archive.frontier(TimelineId(1), model.wal.segment_size()).await.expect("it is readable");
                ends.push(found.end);
            }
            ends
        };
        model.wait_acknowledged("seawall").await;
        agent.wait_state(State::Streaming).await;
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert_eq!(ends().await, [Some(flush), Some(flush)]);
        agent.kill().await;
    });
}
