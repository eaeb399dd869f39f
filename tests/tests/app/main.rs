//! What an app can notice: the corners of the socket interface that apps use. Each is expected of a
//! connection without any proxy first, which proves that the expectation is true, and then of every way.
//! Where a way differs by its nature, the difference is asserted as a fact.

mod connect;
mod send;
mod wait;
