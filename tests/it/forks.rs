//! Timelines that end where little of them can be archived: the archive goes on with what follows, and every repository
//! gets what another has of them. Histories told in order, on virtual time, since no server can be brought there on
//! purpose.

use std::collections::BTreeSet;

use jiff::Timestamp;
use seawall::catalog::FactKind;
use seawall::continuity;
use seawall::repository::layout::WalObject;
use seawall::testkit::store::FaultyStore;
use seawall::wal::{Lsn, SegmentName, TimelineId};

use crate::support::model::{MIB, Model, archives, eventually, facts, on_virtual_time};

/// The server is promoted at `at`; nothing is written after it yet.
fn promote(model: &mut Model, at: Lsn, timeline: u32) {
    model.wal = model.wal.fork(at, TimelineId(timeline));
    model.server.with(|state| state.promote(TimelineId(timeline), at));
}

/// A child's first record.
fn go_on(model: &mut Model) {
    model.wal.end_of_recovery(Timestamp::from_second(1_767_225_600).expect("in range"));
    model.publish();
}

/// The first `bytes` of what is not flushed yet are.
fn publish_some(model: &Model, bytes: u64) {
    let flush = model.server.with(|state| state.flush_lsn());
    let some = model.wal.bytes(flush..flush + bytes).to_vec();
    model.server.with(|state| state.append(&some));
}

fn sealed(store: &FaultyStore) -> BTreeSet<SegmentName> {
    let objects = store.memory().objects();
    let names = objects.keys().filter_map(|key| WalObject::parse(key.as_str().rsplit('/').next()?));
    let segment = |object| if let WalObject::Segment(name, _) = object { Some(name) } else { None };
    names.filter_map(segment).collect()
}

async fn assert_no_gaps(store: &FaultyStore) {
    for archive in archives(store.memory()).await {
        let catalog = archive.load_catalog().await.expect("it is readable");
        assert_eq!(continuity::gaps(&catalog), []);
    }
    assert_eq!(facts(store.memory(), FactKind::Gap).await, []);
}

/// The child is archived from the fork's segment on, and on `timeline` as far as the server is.
async fn follows(model: &mut Model, store: &FaultyStore, timeline: u32) {
    model.write(3 * MIB as usize, 7);
    model.wait_acknowledged("seawall").await;
    let on_child = sealed(store).into_iter().filter(|name| name.timeline == TimelineId(timeline)).count();
    assert!(on_child >= 2, "{:?}", sealed(store));
    assert_no_gaps(store).await;
}

#[test]
fn a_timeline_that_ends_before_a_record_of_it_could_be_proven_is_followed_by_its_child() {
    on_virtual_time(async {
        let (mut model, store) = (Model::new(), FaultyStore::new(1));
        // From the first segment into the third, where the archive begins.
        model.wal.insert(1, &vec![1; 2 * MIB as usize + 100_000]);
        let end = model.publish();
        let agent = model.agent("seawall", &store);
        eventually("everything was sent", || model.server.with(|state| state.sent.values().any(|sent| *sent == end)))
            .await;
        promote(&mut model, end, 2);
        go_on(&mut model);
        follows(&mut model, &store, 2).await;
        assert!(sealed(&store).iter().all(|name| name.timeline == TimelineId(2)), "{:?}", sealed(&store));
        agent.kill().await;
    });
}

#[test]
fn nor_need_anything_be_proven_after_a_first_segment_without_a_record() {
    on_virtual_time(async {
        let (mut model, store) = (Model::new(), FaultyStore::new(1));
        model.wal.insert(1, &vec![1; 2 * MIB as usize + 100_000]);
        publish_some(&model, MIB + 100_000);
        let agent = model.agent("seawall", &store);
        eventually("the stream began", || model.server.with(|state| !state.sent.is_empty())).await;
        let end = model.publish();
        eventually("a segment is stored", || sealed(&store).len() == 1).await;
        promote(&mut model, end, 2);
        go_on(&mut model);
        follows(&mut model, &store, 2).await;
        agent.kill().await;
    });
}

#[test]
fn timelines_that_end_where_they_begin_are_passed_over() {
    on_virtual_time(async {
        for at_segment_start in [false, true] {
            let (mut model, store) = (Model::new(), FaultyStore::new(1));
            let agent = model.agent("seawall", &store);
            model.write(100_000, 1);
            if at_segment_start {
                model.wal.switch();
            }
            let end = model.publish();
            model.wait_acknowledged("seawall").await;
            // A standby that crashed in its promotion, and one that was promoted with its history file.
            promote(&mut model, end, 2);
            promote(&mut model, end, 3);
            go_on(&mut model);
            follows(&mut model, &store, 3).await;
            agent.kill().await;
        }
    });
}

/// No server is known to leave a timeline within a record; whatever makes a stream end with nothing stored, the next one
/// would be the same.
#[test]
fn a_stream_that_stored_nothing_is_not_repeated_at_once() {
    on_virtual_time(async {
        let (mut model, store) = (Model::new(), FaultyStore::new(1));
        let agent = model.agent("seawall", &store);
        let end = model.write(100_000, 1);
        model.wait_acknowledged("seawall").await;
        model.wal.insert(2, &[2; 1000]);
        model.publish();
        model.server.with(|state| state.promote(TimelineId(2), end + 500));
        let failure = agent.wait_failure().await;
        assert!(failure.message.contains("nothing could be stored of it"), "{failure}");
        let sessions = || model.server.with(|state| state.sessions_opened);
        let before = sessions();
        tokio::time::sleep(std::time::Duration::from_secs(3600)).await;
        assert!(sessions() - before < 1000, "{} sessions in an hour", sessions() - before);
        agent.kill().await;
    });
}

/// One was out when a timeline was written beyond its fork, the other when the first one came back and the next timeline
/// began: alone, it was compared with nobody.
#[test]
fn one_that_was_alone_on_a_new_timeline_gets_what_the_other_has_of_the_old_one() {
    on_virtual_time(async {
        let mut model = Model::new();
        let [a, b] = [1, 2].map(FaultyStore::new);
        let stores = [a.clone(), b.clone()];
        let agent = model.agent_of("seawall", &stores, 1);
        model.write(100_000, 1);
        model.wait_acknowledged("seawall").await;
        agent.kill().await;

        a.set_outage(true);
        let agent = model.agent_of("seawall", &stores, 1);
        let fork = model.write(100_000, 2);
        model.write(3 * MIB as usize, 3);
        model.wait_acknowledged("seawall").await;
        a.set_outage(false);
        b.set_outage(true);
        promote(&mut model, fork, 2);
        model.server.with(|state| {
            state.slots.clear();
            state.crash();
        });
        go_on(&mut model);
        model.write(2 * MIB as usize, 4);
        model.wait_acknowledged("seawall").await;
        assert!(sealed(&a).iter().any(|name| name.timeline == TimelineId(2)), "{:?}", sealed(&a));
        // It was looked for what it misses, and nobody was there to have it.
        tokio::time::sleep(std::time::Duration::from_secs(60)).await;

        b.set_outage(false);
        eventually("both hold the same", || sealed(&a) == sealed(&b)).await;
        let beyond = sealed(&a).into_iter().filter(|name| name.timeline == TimelineId(1)).count();
        assert!(beyond >= 2, "{:?}", sealed(&a));
        agent.kill().await;
    });
}
