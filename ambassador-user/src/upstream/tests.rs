//! What becomes of endpoints when an upstream is replaced, and which one a connection gets.

use super::*;
use crate::config::Resolved;

fn meant(endpoints: &str, more: &str) -> Arc<config::Upstream> {
    let text = format!(
        "{{version: 1, routes: [{{listen: 1, upstream: u}}], \
         upstreams: {{u: {{endpoints: [{endpoints}]{more}}}}}}}"
    );
    let resolved = Resolved::of_text("c.yaml".as_ref(), text).unwrap();
    Arc::clone(&resolved.config.routes[0].upstream)
}

#[test]
fn endpoints_that_stay_go_on_and_so_do_the_counts_of_those_that_change() {
    let mut names = Names::default();
    let before = Upstream::new(&meant("'10.0.0.1:1', 'db:1'", ""), None, &mut names);
    let leases: Vec<_> = before.endpoints().iter().map(Lease::new).collect();
    let changed = meant("'10.0.0.1:1:7', '10.0.0.9:1', 'db:1'", ", balance: round_robin");
    let after = Upstream::new(&changed, Some(&before), &mut names);
    let [heavier, new, same] = after.endpoints() else { panic!("three endpoints") };
    assert!(Arc::ptr_eq(same, &before.endpoints()[1]));
    assert_eq!((heavier.weight(), heavier.active(), new.active()), (7, 1, 0));
    drop(leases);
    assert_eq!((heavier.active(), same.active()), (0, 0));
}

#[test]
fn where_a_connect_has_just_failed_others_are_tried_first() {
    let endpoints = "'10.0.0.1:1', '10.0.0.2:1', '10.0.0.3:1'";
    let upstream = Upstream::new(&meant(endpoints, ""), None, &mut Names::default());
    let chosen = |tried: &[usize]| upstream.choose(tried, &Source::Pod, None).unwrap().0;
    let hosts = upstream.hosts();
    let at_its_end = Instant::now() + Duration::from_secs(3600);
    let fails = |host: &Arc<Host>| {
        host.learn(|health| health.blame(Fault::Unreached, Duration::MAX, at_its_end));
    };
    fails(&hosts[0]);
    assert_eq!((chosen(&[]), chosen(&[1]), chosen(&[1, 2])), (1, 2, 0));
    hosts[1..].iter().for_each(fails);
    assert_eq!(chosen(&[]), 0, "they are all alike");
    upstream.reached(&hosts[1]);
    assert_eq!(chosen(&[]), 1);
    let without = meant(endpoints, ", eject: none");
    let upstream = Upstream::new(&without, Some(&upstream), &mut Names::default());
    assert_eq!(upstream.choose(&[], &Source::Pod, None).unwrap().0, 0, "failures say nothing");
}
