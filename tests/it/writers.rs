//! Two agents with two slots and one repository, on virtual time: one writes, the other waits, takes over, and a
//! writer that comes back from the dead writes nothing more.

use std::time::Duration;

use seawall::agent::cluster::State;
use seawall::testkit::store::{Event, FaultyStore, MemoryStore};

use crate::support::model::{Model, Running, eventually, on_virtual_time};

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
